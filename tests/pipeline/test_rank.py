"""PipelineRank: what a command sends on, and what the layers wait for then."""

import pytest
import torch
from tiny_checkpoints import make_reference

import fastshard
from fastshard import Shard
from fastshard.dist import Hops, World
from fastshard.pipeline.commands import Chunk, Start, Step
from fastshard.pipeline.rank import PipelineRank
from fastshard.sampling import Sampling

NUM_SLOTS = 3


class FirstOfTwo(World):
    """The first stage of two, without the other."""

    is_last_stage = False


class RecordedHop:
    """Remembers what was sent."""

    def __init__(self):
        self.sends = []

    def send(self, x, *, num_tokens, max_on_their_way):
        self.sends.append((x.dtype, tuple(x.shape), num_tokens, max_on_their_way))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_reference("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(("uses_nccl", "max_of_steps"), [(True, 0), (False, NUM_SLOTS)])
@pytest.mark.parametrize("is_last", [False, True])
def test_on_nccl_layers_wait_until_what_a_step_gave_has_left(
    path, is_last, uses_nccl, max_of_steps
):
    """A persistent kernel could keep it here for a step. Gloo's may be as many as the slots."""
    world = World() if is_last else FirstOfTwo()
    world.uses_nccl = uses_nccl
    shard = Shard("tiny", 0, 2 if is_last else 1, 3)
    model = fastshard.load(path, shard=shard, device="cpu", max_generated_tokens=0)
    hops = Hops(RecordedHop(), RecordedHop())
    rank = PipelineRank(
        world, [model], hops, num_slots=NUM_SLOTS, context=16, chunk_size=4, mode="eager"
    )
    rank.do(Start(1, Sampling()))
    rank.do(Chunk(1, 0, 4, False), [5, 6, 7, 8])
    rank.do(Chunk(1, 4, 2, True), [9, 10])
    rank.do(Step(1))
    token = (torch.int64, (1,), 1, max_of_steps)
    assert hops.back.sends == ([token, token] if is_last else [])
    hidden = model.config.hidden_size
    chunks = [(torch.float32, (1, length, hidden), length, 1) for length in (4, 2)]
    step = (torch.float32, (1, hidden), 1, max_of_steps)
    assert hops.forward.sends == ([] if is_last else [*chunks, step])
