"""Accelerated transformers models give what the untouched ones give.

Logits and caches are held to float64; tokens of greedy and seeded generation are equal in float32.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import StaticLayer

from fastshard.integrations.transformers import accelerate
from helpers import assert_as_accurate
from tiny_transformers import CACHE, FAMILIES, random_tokens, tiny_model, twin

DTYPES = [torch.float32, torch.float16]
PADDING = torch.ones(2, 11, dtype=torch.long)
LEFT = PADDING.clone()
LEFT[0, :4] = 0
RIGHT = LEFT.flip(1)
HOLES = PADDING.clone()
HOLES[0, 3:5] = 0
BLOCKS = torch.ones(11, 11, dtype=torch.bool).tril()
BLOCKS[6:, :6] = False  # two texts in one row
ADDED = torch.where(BLOCKS, 0.25, -1e4)
ADDED[3, 1] = -1.0
# Arguments of a forward pass, and its tokens that count
INPUTS = {
    "plain": ({}, PADDING),
    "all ones": ({"attention_mask": PADDING}, PADDING),
    "left": ({"attention_mask": LEFT}, LEFT),
    "right": ({"attention_mask": RIGHT}, RIGHT),
    "holes": ({"attention_mask": HOLES}, HOLES),
    "packed": ({"position_ids": torch.cat([torch.arange(6), torch.arange(5)])[None]}, PADDING),
    "own mask": ({"attention_mask": BLOCKS[None, None].expand(2, 1, 11, 11)}, PADDING),
    "added mask": ({"attention_mask": ADDED[None, None].expand(2, 1, 11, 11)}, PADDING),
}


def logits(model, tokens, **arguments):
    dtype = next(model.parameters()).dtype
    mask = arguments.get("attention_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attention_mask"] = mask.to(dtype)
    with torch.no_grad():
        return model(tokens, **arguments).logits


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [("left", dtype) for dtype in DTYPES] + [(inputs, torch.bfloat16) for inputs in INPUTS],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, inputs, dtype):
    arguments, counts = INPUTS[inputs]
    plain, tokens = tiny_model(family, dtype), random_tokens(2, 11)
    model = accelerate(twin(plain))
    golden, naive = (logits(m, tokens, **arguments) for m in (twin(plain).double(), plain))
    counts = counts.bool()
    actual = logits(model, tokens, **arguments)
    assert_as_accurate(actual[counts], golden[counts], naive[counts])


def run_and_read(model, cache, tokens, padding):
    """What the cache holds of real tokens after a prompt and two tokens more; and the logits."""
    out, held = [], []
    for start, end in ((0, 9), (9, 10), (10, 11)):
        mask = padding[:, :end]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        arguments = {CACHE: cache, "attention_mask": mask, "position_ids": positions}
        out.append(logits(model, tokens[:, start:end], **arguments))
    is_real = padding.bool()
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            used = states[:, :, :11].transpose(1, 2)  # a window holds the last tokens
            held.append(used[is_real[:, -used.shape[1] :]])
    return held, torch.cat(out, 1)[is_real]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_hold_the_same(family, kind, is_padded):
    plain, tokens = tiny_model(family, torch.bfloat16), random_tokens(2, 11)
    results = []
    for model in (accelerate(twin(plain)), twin(plain).double(), plain):
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=16)
        else:
            cache = DynamicCache(config=model.config)
        results.append(run_and_read(model, cache, tokens, LEFT if is_padded else PADDING))
    (held, out), (golden_held, golden), (naive_held, naive) = results
    assert_as_accurate(out, golden, naive)
    for actual, exact, eager in zip(held, golden_held, naive_held, strict=True):
        assert_as_accurate(actual, exact, eager)


GENERATIONS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "chunked prompt": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generated(model, tokens, **arguments):
    torch.manual_seed(3)
    return model.generate(tokens, max_new_tokens=12, **arguments)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family, generation):
    plain = tiny_model(family)
    model = accelerate(twin(plain))
    rows = slice(1) if generation == "prompt lookup" else slice(2)
    for prompt, padding in ((random_tokens(2, 11), LEFT), (random_tokens(2, 5, seed=2), None)):
        arguments = dict(GENERATIONS[generation])
        if padding is not None:
            arguments["attention_mask"] = padding[rows]
        expected = generated(plain, prompt[rows], **arguments)
        assert torch.equal(generated(model, prompt[rows], **arguments), expected)
        assert len(expected[0].unique()) > 6  # a text that says something


def test_assisted_generation():
    plain, prompt = tiny_model("llama"), random_tokens(1, 6)
    model, assistant = accelerate(twin(plain)), accelerate(tiny_model("llama", num_hidden_layers=1))
    text = generated(model, prompt, assistant_model=assistant)
    assert torch.equal(text, generated(plain, prompt))


def test_a_static_cache_serves_the_next_prompt():
    plain = tiny_model("qwen3")
    model, cache = accelerate(twin(plain)), None
    for seed in (1, 2):
        prompt = random_tokens(1, 4 + seed, seed=seed)
        if cache is None:
            cache = StaticCache(config=model.config, max_cache_len=24)
        cache.reset()
        text = generated(model, prompt, **{CACHE: cache})
        assert torch.equal(text, generated(plain, prompt))


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no such cache"
)
def test_a_quantised_cache():
    plain, prompt = tiny_model("llama"), random_tokens(2, 9)
    model = accelerate(twin(plain))
    texts = []
    for m in (model, plain):
        cache = QuantizedCache("fp8", config=m.config)
        texts.append(generated(m, prompt, **{CACHE: cache}))
        assert isinstance(cache.layers[0], cache_utils.Fp8QuantizedLayer)
    assert torch.equal(*texts)


def test_a_static_layer_is_attended_to_in_place(monkeypatch):
    def fail(*args):
        raise AssertionError("update copies")

    plain = tiny_model("llama")
    expected = generated(plain, random_tokens(1, 4))
    monkeypatch.setattr(StaticLayer, "update", fail)
    text = generated(accelerate(plain), random_tokens(1, 4), cache_implementation="static")
    assert torch.equal(text, expected)


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i / 4 for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rope(rope):
    parameters = {"rope_type": rope, "rope_theta": 100.0, **ROPES[rope]}
    plain = tiny_model("llama", rope_parameters=parameters, max_position_embeddings=16)
    model = accelerate(twin(plain))
    for size in (6, 24):  # beyond the trained length the dynamic ones change their angles
        tokens = random_tokens(1, size)
        golden, naive = (logits(m, tokens) for m in (twin(plain).double(), plain))
        assert_as_accurate(logits(model, tokens), golden, naive)


def test_hidden_states():
    plain, tokens = tiny_model("qwen2"), random_tokens(2, 5)
    models = {"plain": plain, "before": twin(plain), "after": twin(plain)}
    with torch.no_grad():
        models["before"](tokens, output_hidden_states=True)  # transformers sets its hooks once
        for name in ("before", "after"):
            accelerate(models[name])
        expected, *results = (m(tokens, output_hidden_states=True) for m in models.values())
    for result in results:
        assert len(result.hidden_states) == 3
        torch.testing.assert_close(result.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("cause", ["activation", "bias"])
def test_an_mlp_that_the_kernel_does_not_know_is_left_alone(cause):
    changes, text = {
        "activation": ({"hidden_act": "gelu_new"}, "hidden_act must be one of silu, .*'gelu_new'"),
        "bias": ({"mlp_bias": True}, "their projections must have no bias, got mlp_bias=True"),
    }[cause]
    plain, tokens = tiny_model("llama", **changes), random_tokens(2, 5)
    model = twin(plain)
    with pytest.warns(RuntimeWarning, match=f"the MLPs are left to transformers: {text}"):
        accelerate(model)
    golden, naive = (logits(m, tokens) for m in (twin(plain).double(), plain))
    assert_as_accurate(logits(model, tokens), golden, naive)


def test_a_compiled_forward_has_one_graph_for_all_tokens():
    plain, tokens = tiny_model("llama"), random_tokens(1, 10)
    model = accelerate(twin(plain))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=16)
    out = [logits(model, tokens[:, :6], **{CACHE: cache})]
    with torch.no_grad():
        for i in range(6, 10):
            mask = torch.ones(1, i + 1, dtype=torch.long)
            arguments = {"attention_mask": mask, CACHE: cache, "position_ids": torch.tensor([[i]])}
            inputs = model.prepare_inputs_for_generation(tokens[:, i : i + 1], **arguments)
            out.append(forward(**inputs).logits)
    torch.testing.assert_close(torch.cat(out, 1), logits(plain, tokens))
    assert counter.frame_count == 1


def test_on_the_emulator(device):
    """The kernels in place of the CPU reference: a padded prompt, and tokens in a static cache."""
    plain, tokens = tiny_model("qwen3", torch.bfloat16, num_hidden_layers=1), random_tokens(2, 11)
    results = []
    for model in (accelerate(twin(plain)), twin(plain).double(), plain):
        cache = StaticCache(config=model.config, max_cache_len=16)
        results.append(run_and_read(model.to(device), cache, tokens.to(device), LEFT.to(device)))
    (held, out), (golden_held, golden), (naive_held, naive) = results
    for actual, exact, eager in zip(
        [*held, out], [*golden_held, golden], [*naive_held, naive], strict=True
    ):
        assert_as_accurate(actual, exact, eager)
