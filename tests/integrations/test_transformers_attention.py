"""The attention and mask function that transformers knows as ``fastshard``."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastshard.integrations.transformers import attention as module
from helpers import assert_as_accurate
from tiny_transformers import CACHE, FAMILIES, random_tokens, tiny_model

B, S = 2, 9
LEFT = torch.ones(B, S, dtype=torch.bool)
LEFT[1, :3] = False


def test_the_name_is_registered():
    assert ALL_ATTENTION_FUNCTIONS["fastshard"] is module.attention
    assert ALL_MASK_ATTENTION_FUNCTIONS["fastshard"] is module.mask


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_take_it_by_name(family, cache):
    plain, prompt = tiny_model(family), random_tokens(B, S)
    model = tiny_model(family, attn_implementation="fastshard")
    assert model.config._attn_implementation == "fastshard"
    arguments = {"attention_mask": LEFT.long(), "max_new_tokens": 10, "cache_implementation": cache}
    with torch.no_grad():
        texts = [m.generate(prompt, **arguments) for m in (model, plain)]
    assert torch.equal(*texts)


def heads(num_heads, length, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, num_heads, length, 16, generator=generator, dtype=torch.float64).to(dtype)


def golden(q, k, v, mask, scale=0.25, softcap=None):
    """Attention with a mask ``[.., s, S]``, True = attend, of grouped heads, in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def rule(s, total, window=None, offset=None):
    q = torch.arange(s)[:, None] + (total - s if offset is None else offset)
    keys = torch.arange(total)
    return (keys <= q) & (keys > q - (window or total))


SPAN = torch.tensor([[[[0, S]]], [[[3, 7]]]])
CASES = {
    # case -> s, mask, keywords, what may be attended to
    "causal": (S, None, {}, rule(S, S)),
    "new prompt in a static cache": (4, None, {}, rule(4, S, offset=0)),
    "one query": (1, None, {}, rule(1, S)),
    "window": (S, None, {"sliding_window": 3}, rule(S, S, 3)),
    "all": (4, None, {"is_causal": False}, torch.ones(4, S, dtype=torch.bool)),
    "softcap": (S, None, {"softcap": 2.0}, rule(S, S)),
    "bool": (2, LEFT[:, None, None].expand(B, 1, 2, S), {}, LEFT[:, None, None]),
    "span": (
        2,
        SPAN,
        {},
        torch.stack([rule(2, S), rule(2, S, offset=5) & (torch.arange(S) >= 3)])[:, None],
    ),
    "span with a window": (
        2,
        SPAN,
        {"sliding_window": 3},
        torch.stack([rule(2, S, 3), rule(2, S, 3, offset=5) & (torch.arange(S) >= 3)])[:, None],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(case):
    s, mask, arguments, allowed = CASES[case]
    tensors = [heads(4, s, 1), heads(2, S, 2), heads(2, S, 3)]
    softcap = arguments.get("softcap")
    q, k, v = (t.bfloat16() for t in tensors)
    exact = golden(*(t.double() for t in (q, k, v)), allowed, softcap=softcap)
    naive = golden(q, k, v, allowed, softcap=softcap)
    out, weights = module.attention(torch.nn.Identity(), q, k, v, mask, scaling=0.25, **arguments)
    assert weights is None
    assert_as_accurate(out, exact, naive)


def test_an_added_mask():
    q, k, v = heads(4, 3, 1), heads(2, S, 2), heads(2, S, 3)
    added = torch.randn(1, 1, 3, S, dtype=torch.float64)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.25 + added
    exact = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    q, k, v = (t.float() for t in (q, k, v))
    out, _ = module.attention(torch.nn.Identity(), q, k, v, added.float(), scaling=0.25)
    torch.testing.assert_close(out, exact.float())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dropout": 0.1}, ValueError, "dropout must be 0 .*'fastshard', got 0.1; .*'sdpa' can do"),
        ({"output_attentions": True}, ValueError, "output_attentions must be False .* 'eager' can"),
        ({"s_aux": torch.ones(4)}, ValueError, "s_aux must be None for attention 'fastshard'"),
        ({"position_bias": torch.ones(4)}, ValueError, "position_bias must be None"),
        (
            {"attention_mask": torch.ones(B, S)},
            ValueError,
            r"attention_mask must be \[1 or 2, 1, 9, keys\], one for all heads, .* \[2, 9\]",
        ),
        (
            {"attention_mask": torch.ones(B, 4, S, S, dtype=torch.bool)},
            ValueError,
            r"one for all heads, got shape \[2, 4, 9, 9\]",
        ),
        (
            {"attention_mask": torch.ones(B, 1, S, S, dtype=torch.int64)},
            ValueError,
            "attention_mask must be bool or floating, got torch.int64",
        ),
        (
            {"query": heads(4, S, 1, torch.float32).requires_grad_()},
            RuntimeError,
            r"'fastshard' computes no gradients: call it under torch.no_grad\(\), or train with",
        ),
    ],
)
def test_what_the_kernels_lack_is_an_error(change, error, text):
    arguments = {
        "query": heads(4, S, 1, torch.float32),
        "key": heads(2, S, 2, torch.float32),
        "value": heads(2, S, 3, torch.float32),
        "attention_mask": None,
    }
    with pytest.raises(error, match=text):
        module.attention(torch.nn.Identity(), **{**arguments, **change})


def expanded(mask, q_length, kv_length, window=None):
    """What a mask of this module lets each query attend to, ``[b, 1, s, S]``."""
    if mask is None:
        # Of more keys than queries only the first count, but of one query all.
        offset = 0 if q_length > 1 else None
        return rule(q_length, kv_length, window, offset).expand(B, 1, q_length, kv_length)
    if mask.dtype == torch.bool:
        return mask.expand(B, 1, q_length, kv_length)
    assert mask.shape == (B, 1, 1, 2)
    rows = []
    for first, end in mask[:, 0, 0].tolist():
        allowed = rule(q_length, kv_length, window, end - q_length)
        rows.append(allowed & (torch.arange(kv_length) >= first))
    return torch.stack(rows)[:, None]


def padding(kind, length):
    mask = torch.ones(B, length, dtype=torch.bool)
    if kind == "left":
        mask[1, :2] = False
    if kind == "right":
        mask[1, -2:] = False
    return None if kind is None else mask


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", [None, "whole", "left", "right"])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_masks_say_what_transformers_says(cache, kind, window):
    """For a prompt, a chunk after it, and single tokens; without a tensor of queries by keys."""
    model = tiny_model(
        "mistral" if window else "llama", **({"sliding_window": 4} if window else {})
    )
    config, held = model.config, None
    if cache == "dynamic":
        held = DynamicCache(config=config)
    elif cache == "static":
        held = StaticCache(config=config, max_cache_len=12)
    create = create_sliding_window_causal_mask if window else create_causal_mask
    seen = 0
    for s in (5, 2, 1, 1) if held is not None else (6,):
        masks = {}
        for name in ("sdpa", "fastshard"):
            config._attn_implementation = name
            arguments = {"attention_mask": padding(kind, seen + s), CACHE: held}
            embeddings = torch.empty(B, s, 0)
            masks[name] = create(config=config, inputs_embeds=embeddings, **arguments)
        kv_length = s if held is None else held.get_mask_sizes(s, 0)[0]
        expected = masks["sdpa"]
        if expected is None:
            expected = expanded(None, s, kv_length, window)
        actual = masks["fastshard"]
        assert torch.equal(expanded(actual, s, kv_length, window), expected)
        # Of several tokens over a static cache, transformers 5.4 always asks for the whole mask.
        may_be_short = s == 1 or CACHE == "cache" or cache != "static"
        if (s > 1 or window is None) and kind != "right" and may_be_short:
            assert actual is None or actual.dtype == torch.int64  # no queries by keys
        if held is not None:
            states = torch.zeros(B, 1, s, 8)
            for layer in range(2):
                held.update(states, states, layer)
        seen += s


def test_a_single_query_sees_no_slot_after_its_own():
    arguments = {"batch_size": B, "q_length": 1, "kv_length": 6, "q_offset": torch.tensor(2)}
    for padding in (torch.ones(B, 6, dtype=torch.bool), LEFT[:, :6]):
        actual = module.mask(**arguments, attention_mask=padding)
        seen = padding & (torch.arange(6) < 3)
        assert torch.equal(expanded(actual, 1, 6)[:, 0, 0], seen)


def test_another_rule_gets_a_full_mask():
    arguments = {"batch_size": B, "q_length": 6, "kv_length": 6, "device": "cpu"}
    sliding = {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    changed = {**arguments, **sliding, "allow_is_causal_skip": False}
    changed["config"] = tiny_model("mistral").config
    assert torch.equal(module.mask(**changed), sdpa_mask(**changed))
    # A model whose layers may not pass their window to attention, or whose chunks look like one.
    other = {**arguments, **sliding, "config": tiny_model("llama").config}
    other["config"].model_type = "another"
    assert torch.equal(module.mask(**other), sdpa_mask(**other))
