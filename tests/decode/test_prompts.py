"""Prompts from CUDA graphs: the tokens of those that are not, whatever their length."""

import copy

import pytest
import torch
from recorded_graphs import pretend_to_capture
from tiny_checkpoints import (
    FAMILIES,
    write_byte_checkpoint,
)

import fastshard
from fastshard import Shard, ShardChain, generate_batch
from fastshard.decode import static
from fastshard.sampling import Sampling
from helpers import CUDA_ONLY

PROMPT = list(range(3, 23))  # of which the first tokens are prompts
LENGTHS = (4, 9, 16)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_byte_checkpoint(folder / family, family)
    return folder


@pytest.fixture
def captured(monkeypatch):
    """The recordings made so far."""
    return pretend_to_capture(monkeypatch)


def load(path, lengths=LENGTHS, device="cpu"):
    model = fastshard.load(path, device=device)
    model.capture_prompts(lengths)
    return model


def tokens_of(model, length, new_tokens=6, **settings):
    settings |= {"max_new_tokens": new_tokens, "decode": "eager"}
    return generate_batch(model, [PROMPT[:length]], **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_gives_the_tokens_of_eager(family, paths, captured):
    plain, model = fastshard.load(paths / family, device="cpu"), load(paths / family)
    for length in (9, 1, 3, 4, 5, 16, 8, 2):  # shorter after longer: what that left is not seen
        assert tokens_of(model, length) == tokens_of(plain, length)
    assert len(captured) == 3
    assert tokens_of(model, 17) == tokens_of(plain, 17)  # longer than all
    assert len(captured) == 3


def test_logits_are_those_of_the_last_token(paths, captured):
    plain, model = fastshard.load(paths / "llama", device="cpu"), load(paths / "llama")
    for length in (7, 9):
        tokens = torch.tensor([PROMPT[:length]])
        expected = plain.generate(tokens, num_logits=1)[1]
        torch.testing.assert_close(model.prompt_graphs.run(tokens), expected)
        assert model.model.cache_size == length
        other = model.generate(torch.tensor([[5]]), curr_pos=length)[1]  # after the prompt's end
        torch.testing.assert_close(other, plain.generate(torch.tensor([[5]]), curr_pos=length)[1])


def test_a_length_is_captured_when_it_is_needed(paths, captured):
    model = load(paths / "llama", (16, 4, 4, 9))
    assert (model.prompt_graphs.lengths, captured) == ([4, 9, 16], [])
    tokens_of(model, 4)
    assert len(captured) == 1
    tokens_of(model, 3)
    assert len(captured) == 1
    "".join(model.stream("abcdefghijkl", max_new_tokens=2, decode="eager"))
    assert len(captured) == 2


def test_chunks_and_batches_run_as_before(paths, captured):
    model = load(paths / "llama")
    plain = fastshard.load(paths / "llama", device="cpu")
    settings = {"max_new_tokens": 4, "decode": "eager"}
    prompts = [PROMPT[:5], PROMPT[:3]]
    assert generate_batch(model, prompts, **settings) == generate_batch(plain, prompts, **settings)
    assert tokens_of(model, 8, prefill_chunk_size=7) == tokens_of(plain, 8)
    assert captured == []


def test_one_graph_a_device(paths, captured, monkeypatch):
    """The stand-in for devices are shards that are kept apart."""
    monkeypatch.setattr(static, "by_device", lambda models: [[model] for model in models])
    ends = [range(0, 1), range(1, 2), range(2, 3)]
    shards = [Shard("tiny", part.start, part.stop - 1, 3) for part in ends]
    chain = ShardChain([fastshard.load(paths / "llama", shard=s, device="cpu") for s in shards])
    chain.capture_prompts(LENGTHS)
    plain = fastshard.load(paths / "llama", device="cpu")
    for length in (6, 9, 2):
        assert tokens_of(chain, length) == tokens_of(plain, length)
    assert len(captured) == 3 * 2


def test_replaced_weights_are_seen(paths, captured):
    model = load(paths / "llama")
    before = tokens_of(model, 5)
    state = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    name = "layers.1.mlp.w1.weight"
    model.model.load_state_dict(state | {name: -state[name]}, assign=True)
    assert tokens_of(model, 5) != before
    assert len(captured) == 2
    model.model.load_state_dict(state)  # in place: the graph reads the same memory
    assert tokens_of(model, 5) == before
    assert len(captured) == 2


def test_replaced_caches_are_seen(paths, captured):
    model = load(paths / "llama")
    plain = fastshard.load(paths / "llama", device="cpu")
    assert tokens_of(model, 5) == tokens_of(plain, 5)
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=40)
    assert tokens_of(model, 5) == tokens_of(plain, 5)
    assert len(captured) == 2
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=8)  # less than the graph's 9
    with pytest.raises(ValueError, match=r"must be at most max_seq_len|must have room"):
        tokens_of(model, 5, new_tokens=2)


def test_a_copy_captures_its_own(paths, captured):
    model = load(paths / "llama")
    before = tokens_of(model, 5)
    other = copy.deepcopy(model)
    assert not other.prompt_graphs._graphs
    for weight in other.parameters():
        weight.neg_()
    assert tokens_of(other, 5) != before
    assert other.prompt_graphs._model is other
    assert tokens_of(model, 5) == before
    assert len(captured) == 2


@pytest.mark.parametrize("lengths", [[], [0], [65], [4, -1]], ids=str)
def test_lengths_that_cannot_be(lengths, paths, captured):
    model = fastshard.load(paths / "llama", device="cpu")
    with pytest.raises(ValueError, match=r"^lengths must be at least one, each of 1 to 64, got \["):
        model.capture_prompts(lengths)


def test_a_cpu_has_no_graphs(paths):
    model = fastshard.load(paths / "llama", device="cpu")
    with pytest.raises(ValueError, match=r"^a CUDA graph needs a GPU, got cpu$"):
        model.capture_prompts([4])
    part = fastshard.load(paths / "llama", shard=Shard("tiny", 0, 1, 3), device="cpu")
    with pytest.raises(ValueError, match=r"^capture_prompts needs all 3 layers"):
        part.capture_prompts([4])


def test_ranks_that_wait_on_the_host_cannot_be_captured(paths, captured, monkeypatch):
    model = fastshard.load(paths / "llama", device="cpu")
    monkeypatch.setattr(type(model.model), "is_capturable", False)
    with pytest.raises(ValueError, match=r"^a CUDA graph cannot hold a sum over ranks by other"):
        model.capture_prompts([4])


@CUDA_ONLY
@pytest.mark.parametrize("decode", ["persistent", "graph"])
def test_a_gpu_replays_prompts(paths, device, decode):
    plain = fastshard.load(paths / "llama-3.2", device=device)
    model = load(paths / "llama-3.2", device=device)
    settings = {"max_new_tokens": 8, "decode": decode, "sampling": Sampling()}
    for length in (5, 9, 3, 16, 1):
        tokens = torch.tensor([PROMPT[:length]], device=device)
        expected = plain.generate(tokens, num_logits=1)[1]
        torch.testing.assert_close(model.prompt_graphs.run(tokens), expected, atol=3e-2, rtol=3e-2)
        (found,) = generate_batch(model, [PROMPT[:length]], **settings)
        assert len(found) == 8
    model.to(torch.float16)  # other weights, in other memory
    plain.to(torch.float16)
    tokens = torch.tensor([PROMPT[:5]], device=device)
    model.model.setup_caches(1, torch.float16)
    plain.model.setup_caches(1, torch.float16)
    expected = plain.generate(tokens, num_logits=1)[1]
    torch.testing.assert_close(model.prompt_graphs.run(tokens), expected, atol=3e-2, rtol=3e-2)
