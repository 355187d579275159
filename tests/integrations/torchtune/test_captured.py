"""CapturedStep: the tokens of torchtune's generate, by replays that read static buffers only."""

import copy

import pytest
import torch
from torchtune.generation import generate
from torchtune.models.llama3_2._component_builders import llama3_2

import decoder_reference as reference
from fastshard.integrations.torchtune import CapturedStep, accelerate, captured

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, some ulps of values below 10


def build():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "num_layers": 2, "embed_dim": 64, "intermediate_dim": 80}
    model = llama3_2(**sizes, num_heads=4, num_kv_heads=2, max_seq_len=64).eval()
    model.load_state_dict(reference.random_state(model))
    model.setup_caches(2, torch.float32, decoder_max_seq_len=24)
    return model


class Graphs:
    """As much of a CUDA graph as there is without a GPU.

    A capture runs the host's code and leaves the device as it was; a replay does to the device what
    the step does, and nothing on the host.
    """

    def __init__(self, model):
        self.caches = [layer.attn.kv_cache for layer in model.layers]
        self.captures = self.replays = 0
        self.step = CapturedStep()

    def capture(self, launch, device):
        self.captures += 1
        tensors = [t for cache in self.caches for t in cache.buffers()]
        before = [t.clone() for t in tensors]
        with torch.no_grad():
            launch()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)  # not counted as a write

        def replay():
            self.replays += 1
            held = [cache._num_held for cache in self.caches]
            for cache, count in zip(self.caches, held, strict=True):
                cache.assume(count - 1)  # as before the step, which is counted already
            out = self.step._out
            launch()
            out.copy_(self.step._out)
            self.step._out = out
            for cache, count in zip(self.caches, held, strict=True):
                cache.assume(count)

        return replay


@pytest.fixture
def models(monkeypatch):
    """An accelerated model, one that is not, and the graphs of the first."""
    theirs = build()
    ours = accelerate(copy.deepcopy(theirs))
    graphs = Graphs(ours)
    monkeypatch.setattr(captured, "capture", graphs.capture)
    monkeypatch.setattr(captured, "is_gpu", lambda device: True)
    return ours, theirs, graphs


def prompt(seed: int):
    return torch.randint(1, 96, (2, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [None, 5])
@torch.no_grad()
def test_generate_gives_the_same_tokens(models, top_k):
    ours, theirs, graphs = models
    step = graphs.step
    for seed in range(3):  # the last is padded
        tokens = prompt(seed)
        tokens[0, : seed // 2 * 3] = 0
        results = []
        for model, own in ((ours, step), (theirs, None)):
            rng = torch.Generator().manual_seed(seed)
            settings = {"top_k": top_k, "rng": rng, "custom_generate_next_token": own}
            results.append(generate(model, tokens, max_generated_tokens=9, **settings))
            assert model.layers[1].attn.kv_cache.size == 13
            model.reset_caches()
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], **CLOSE)
    # The padded prompt has masks and positions of two rows: a key of its own.
    assert (graphs.captures, graphs.replays) == (2, 7 + 8 + 7)


def mask_of(start: int, end: int):
    return torch.ones(1, 24, 24).bool().tril()[:, start:end]


def run(model, step, slot: int):
    one = prompt(7)[:, slot % 5, None]
    return step(model, torch.tensor([slot]), one, mask=mask_of(slot, slot + 1))[1]


@torch.no_grad()
def test_captured_again_where_memory_is_elsewhere(models):
    ours, theirs, graphs = models
    step = graphs.step
    for slot in range(4):
        logits = run(ours, step, slot)
        torch.testing.assert_close(logits, run(theirs, CapturedStep(), slot), **CLOSE)
        if slot == 2:
            kept, values = logits, logits.clone()
    assert (graphs.captures, graphs.replays) == (1, 3)
    assert torch.equal(kept, values)  # no replay writes to what was returned
    moved = ours.double().float()
    for slot in range(4, 7):
        expected = run(theirs, CapturedStep(), slot)
        torch.testing.assert_close(run(moved, step, slot), expected, **CLOSE)
    assert graphs.captures == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["norm.scale", "layers.1.mlp.w2.weight", "tok_embeddings.weight"])
def test_captured_again_where_one_weight_is_elsewhere(models, name):
    ours, theirs, graphs = models
    for slot in range(3):
        run(ours, graphs.step, slot)
        run(theirs, CapturedStep(), slot)
    for model in (ours, theirs):
        state = {name: 2 * model.get_parameter(name).detach()}
        model.load_state_dict(state, strict=False, assign=True)
    expected = run(theirs, CapturedStep(), 3)
    torch.testing.assert_close(run(ours, graphs.step, 3), expected, **CLOSE)
    assert (graphs.captures, graphs.replays) == (1, 2)  # the step after the change is no replay
    run(ours, graphs.step, 4)
    assert graphs.captures == 2


@torch.no_grad()
def test_steps_that_are_not_captured(models, monkeypatch):
    ours, theirs, graphs = models
    step = graphs.step
    for model in (theirs, theirs, theirs):  # not accelerated
        run(model, step, model.layers[0].attn.kv_cache.size)
    for start in (0, 3, 6):  # several tokens
        part = {"mask": mask_of(start, start + 3), "input_pos": torch.arange(start, start + 3)}
        step(ours, part["input_pos"], prompt(1)[:, :3], mask=part["mask"])
    monkeypatch.setattr(captured, "is_gpu", lambda device: False)
    for slot in (9, 10, 11):
        run(ours, step, slot)
    assert graphs.captures == 0


@torch.no_grad()
def test_a_full_cache_and_a_failed_capture(models, monkeypatch):
    ours, _, graphs = models
    step = graphs.step
    for slot in range(24):
        run(ours, step, slot)
    with pytest.raises(ValueError, match="24 of its 24 slots are used, got 1 tokens more"):
        run(ours, step, 23)
    assert graphs.replays == 23
    ours.reset_caches()
    run(ours, step, 0)  # the same memory: replayed
    assert (graphs.captures, graphs.replays) == (1, 24)

    def fail(launch, device):
        launch()
        for cache in graphs.caches:
            cache.cache_pos.data -= 1
        raise RuntimeError("no memory for the graph")

    monkeypatch.setattr(captured, "capture", fail)
    step = CapturedStep()
    run(ours, step, 1)
    with pytest.raises(RuntimeError, match="no memory for the graph"):
        run(ours, step, 2)
    assert graphs.caches[0].next_slots(2, 1).tolist() == [2]
    with pytest.raises(ValueError, match="2 of its 24 slots are used, got 23 tokens more"):
        graphs.caches[1].next_slots(2, 23)
