"""Operations and memory by hand; every way to attend and to prefill is the same computation."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from fastshard.bench.case import Bench, Settings
from fastshard.bench.decode import random_model
from fastshard.bench.plain_decoder import PlainDecoder
from fastshard.bench.plain_prefill import PlainPrefill
from fastshard.bench.prefill import memory_goal, prefill_flops
from fastshard.bench.prefill_attention import case, flex_call, golden
from fastshard.bench.presets import preset
from fastshard.bench.timing import relative_error

CPU = torch.device("cpu")


def test_flops_of_the_1b_model():
    # matrices: 1,235,814,400 parameters less 33 norms of 2048 and the head of 128,256 x 2048;
    # scores and values of 2048 * 2049 / 2 pairs: 4 x 2048 each
    head = 128_256 * 2048
    matrices = 2 * 2048 * (1_235_814_400 - 33 * 2048 - head) + 2 * head
    attention = 16 * 4 * 2048 * 2_098_176
    assert prefill_flops(preset("llama-3.2-1b"), 1, 2048) == matrices + attention
    assert prefill_flops(preset("llama-3.2-1b"), 3, 2048) == 3 * (matrices + attention)


def test_memory_of_the_8b_model():
    # 2048 rows of 4096 + 4096 + 14336 in 16 bit are 92,274,688 bytes; and 10 %
    assert memory_goal(preset("llama-3.1-8b"), 1, 2048, 2) == 101_502_156


def model_of(config, num_tokens: int, dtype: torch.dtype):
    config = dataclasses.replace(
        config, vocab_size=300, intermediate_size=64, max_seq_len=num_tokens
    )
    return random_model(config, 2, num_tokens, CPU, dtype)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b"])
@torch.no_grad()
def test_the_peers_prefill_is_ours(name):
    torch.manual_seed(0)
    model = model_of(preset(name, num_layers=2), 19, torch.float32)
    plain = PlainPrefill(PlainDecoder(model.model, 2, 19))
    tokens = torch.randint(300, (2, 17))
    expected = model.generate(tokens, num_logits=1)[1][:, 0]
    for backend in (None, SDPBackend.MATH):
        logits = plain.using(backend)(tokens)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.model.layers.values(), plain.decoder.layers, strict=True):
        for cache in ("k_cache", "v_cache"):
            own = getattr(ours.attn.kv_cache, cache)
            torch.testing.assert_close(getattr(theirs, cache), own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_golden_of_a_prefill_is_exact_and_changes_nothing():
    torch.manual_seed(0)
    model = model_of(preset("qwen2.5-0.5b", num_layers=2), 19, torch.bfloat16)
    plain = PlainPrefill(PlainDecoder(model.model, 2, 19))
    tokens = torch.randint(300, (2, 17))
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    expected = plain.golden(tokens)
    assert expected.dtype == torch.float64
    assert all(buffer.equal(before[name]) for name, buffer in plain.named_buffers())
    assert relative_error(plain.double()(tokens), expected) < 1e-7  # rounded to float32 at the end


@torch.no_grad()
def test_the_peers_prefill_compiles_in_one_graph():
    torch.manual_seed(0)
    model = model_of(preset("llama-3.2-1b", num_layers=1), 19, torch.float32)
    tokens = torch.randint(300, (2, 17))
    plain = PlainPrefill(PlainDecoder(model.model, 2, 19)).using(SDPBackend.MATH)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend="aot_eager")
    assert compiled(tokens).equal(plain(tokens))


def tensors(num_kv_heads: int):
    torch.manual_seed(0)
    q = torch.randn(2, 1, 150, 6, 16)  # sets, batch, tokens, heads, head_dim
    k, v = torch.randn(2, 2, 1, 150, num_kv_heads, 16)
    return q, k, v, torch.rand(1, 150, 150) < 0.5


@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("rule", ["causal", "full", "mask"])
def test_flex_attention_is_asked_for_the_rule(rule, num_kv_heads):
    q, k, v, mask = tensors(num_kv_heads)
    rules = (mask if rule == "mask" else None, rule == "causal")
    rows = torch.tensor([0, 7, 149])
    call = flex_call(flex_attention, q, k, v, *rules)
    for i in range(2):
        expected = golden(q[i], k[i], v[i], *rules, rows)
        assert relative_error(call(i)[:, rows], expected) < 1e-6


def test_golden_attention_by_hand():
    q = torch.tensor([[[[2.0, 0, 0, 0]]] * 3])  # three tokens of one head
    k = torch.eye(4)[None, :3, None] * 4  # scores 2 * 4 / sqrt(4) = 4 for key 0, else 0
    v = torch.eye(4)[None, :3, None]
    mask = torch.tensor([[[1, 0, 0], [0, 1, 1], [1, 0, 1]]]).bool()
    rows = torch.tensor([1, 2])
    e = torch.tensor(4.0, dtype=torch.float64).exp().item()
    expected = {
        (None, True): [[e / (e + 1), 1 / (e + 1), 0], [e / (e + 2), 1 / (e + 2), 1 / (e + 2)]],
        (mask, False): [[0, 0.5, 0.5], [e / (e + 1), 0, 1 / (e + 1)]],
    }
    for rules, weights in expected.items():
        out = golden(q, k, v, *rules, rows)[0, :, 0, :3]
        torch.testing.assert_close(out, torch.tensor(weights, dtype=torch.float64))


def test_attention_refuses_other_rules():
    bench = Bench(CPU, None, None, Settings())
    with pytest.raises(ValueError, match="rule must be one of causal, full, mask, got 'window'"):
        case(bench, "", "window", 1, 8, 1, 1, 8)
