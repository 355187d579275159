"""Single tokens over a static cache from a CUDA graph; on the CPU a replay runs the step again."""

import copy
import gc

import pytest
import torch
from transformers import StaticCache

from fastshard.integrations.transformers import accelerate, decode_graph, undo
from helpers import CUDA_ONLY, assert_as_accurate
from tiny_transformers import CACHE, FAMILIES, random_tokens, tiny_model, twin

FULL = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}


@pytest.fixture
def captures(monkeypatch):
    """Lists what is captured. A capture runs nothing, a replay the same step over its buffers."""
    done = []

    def capture(launch, device):
        written = []

        def replay():  # writes to the same memory each time
            launch()
            step = next(s for s in decode_graph._steps.values() if s._replay is replay)
            written.append(step._hidden)
            step._hidden = written[0].copy_(step._hidden)

        done.append(launch)
        return replay

    monkeypatch.setattr(decode_graph, "is_gpu", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return done


def generated(model, seed=1, **arguments):
    torch.manual_seed(3)
    padding = torch.ones(2, 5, dtype=torch.long)
    padding[0, :2] = 0
    arguments = {"max_new_tokens": 9, "cache_implementation": "static", **arguments}
    return model.generate(random_tokens(2, 5, seed=seed), attention_mask=padding, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_the_same(family, captures):
    plain = tiny_model(family, **FULL.get(family, {}))
    model = accelerate(twin(plain))
    for count, seed in enumerate((1, 2), start=1):
        assert torch.equal(generated(model, seed), generated(plain, seed))
        assert len(captures) in (1, count)  # transformers 5.4 used one cache for all prompts


@pytest.mark.parametrize(
    ("family", "changes", "arguments"),
    [
        ("llama", {}, {"cache_implementation": "dynamic"}),
        ("llama", {}, {"cache_implementation": None, "use_cache": False}),
        ("llama", {}, {"num_beams": 2}),
        ("llama", {}, {"output_hidden_states": True}),
        ("mistral", {}, {}),
        ("qwen2", {}, {}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 100.0,
                    "original_max_position_embeddings": 64,
                }
            },
            {},
        ),
    ],
)
def test_what_is_no_plain_step_is_not_captured(family, changes, arguments, captures):
    plain = tiny_model(family, **changes)
    model = accelerate(twin(plain))
    assert torch.equal(generated(model, **arguments), generated(plain, **arguments))
    assert captures == []


def steps(model, count=5, **changes):
    """Hidden states of ``count`` tokens after a prompt, read when all are there."""
    cache, tokens = StaticCache(config=model.config, max_cache_len=16), random_tokens(1, 12)
    out = []
    with torch.no_grad():
        model(tokens[:, :5], **{CACHE: cache})
        for i in range(5, 5 + count):
            mask = (torch.arange(16) <= i)[None, None, None]
            arguments = {CACHE: cache, "attention_mask": mask, **changes}
            out.append(model.model(input_ids=tokens[:, i : i + 1], **arguments)[0])
    return torch.cat(out, 1)


def test_hidden_states_are_the_callers(captures):
    model = accelerate(tiny_model("llama"))
    assert torch.equal(steps(model), steps(model, output_hidden_states=True))
    assert len(captures) == 1


def test_hooks_run(captures):
    model, seen = accelerate(tiny_model("llama")), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    steps(model, count=4)
    assert captures == []
    assert len(seen) == 1 + 4


def test_gradients_and_compilers_get_no_graph(captures):
    model = accelerate(tiny_model("llama"))
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    for _ in range(3):
        model(random_tokens(1, 1), **{CACHE: cache, "attention_mask": mask})
    assert captures == []


def test_a_model_that_changed_gets_another_graph(captures):
    plain = tiny_model("qwen3")
    model = accelerate(twin(plain))
    cache, tokens = StaticCache(config=model.config, max_cache_len=16), random_tokens(1, 12)
    with torch.no_grad():
        model(tokens[:, :3], **{CACHE: cache})
        for i in range(3, 12):
            if i == 7:  # its weights lie elsewhere
                model.double().float()
            mask = (torch.arange(16) <= i)[None, None, None]
            out = model(tokens[:, i : i + 1], **{CACHE: cache, "attention_mask": mask}).logits
        torch.testing.assert_close(out[:, -1], plain(tokens).logits[:, -1])
    assert len(captures) == 2


def test_a_graph_goes_with_its_cache(captures, monkeypatch):
    def capture(launch, device):  # like a graph, the replay does not hold what it launches
        launch()
        return lambda: None

    monkeypatch.setattr(decode_graph, "capture", capture)
    before = len(decode_graph._steps)
    generated(accelerate(tiny_model("llama")))
    gc.collect()
    assert len(decode_graph._steps) == before


def test_graphs_stay_out_of_copies(captures):
    model = accelerate(tiny_model("llama"))
    expected = generated(model)
    assert torch.equal(generated(copy.deepcopy(model)), expected)
    assert "forward" not in vars(undo(model).model)


@CUDA_ONLY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, dtype, device, monkeypatch):
    """Real graphs: logits of every token against float64, and one capture a cache."""
    count = []
    capture = decode_graph.capture
    monkeypatch.setattr(decode_graph, "capture", lambda *args: count.append(1) or capture(*args))
    plain = tiny_model(family, dtype, **FULL.get(family, {})).to(device)
    results = []
    for model in (accelerate(twin(plain)), twin(plain).double(), plain):
        cache, tokens = StaticCache(config=model.config, max_cache_len=16), random_tokens(2, 12)
        tokens, out = tokens.to(device), []
        padding = torch.ones_like(tokens)
        padding[0, :2] = 0
        with torch.no_grad():
            for start, end in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
                arguments = {CACHE: cache, "attention_mask": padding[:, :end]}
                inputs = model.prepare_inputs_for_generation(tokens[:, start:end], **arguments)
                out.append(model(**inputs).logits[:, -1])
        results.append(torch.stack(out))
    assert_as_accurate(*results)
    assert len(count) == 1
