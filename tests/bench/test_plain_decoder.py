"""The peers' decoder computes what ours computes: else a comparison of times means nothing."""

import dataclasses

import pytest
import torch

from fastshard import ModelConfig
from fastshard.bench import plain_decoder
from fastshard.bench.decode import random_model
from fastshard.bench.plain_decoder import ATTENTIONS, PlainDecoder
from fastshard.bench.timing import relative_error

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "rms_norm_eps": 0.01,
    "rope_theta": 100.0,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "hidden_act": "gelu"},
    "qwen2": {},
    "qwen3": {"hidden_act": "gelu_pytorch_tanh"},
    "generic": {"hidden_act": "relu", "partial_rotary_factor": 0.5},
}
CONTEXT = 24


def config(family: str) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": family} | TINY | FAMILIES[family])


def random_decoder(*arguments):
    return random_model(*arguments).model


def one_step(model, batch: int, context: int = CONTEXT):
    """Tokens, position, and our logits for them at the last slot; the caches are as before."""
    tokens = torch.randint(TINY["vocab_size"], (batch,))
    model.reset_caches()
    model.advance(batch, context - 1)
    caches = [
        cache.clone()
        for layer in model.layers.values()
        for cache in (layer.attn.kv_cache.k_cache, layer.attn.kv_cache.v_cache)
    ]
    logits = model(tokens[:, None])[:, 0]
    for layer in model.layers.values():
        layer.attn.kv_cache.k_cache.copy_(caches.pop(0))
        layer.attn.kv_cache.v_cache.copy_(caches.pop(0))
    return tokens, torch.tensor([context - 1]), logits


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_agrees_with_ours(family, attention):
    torch.manual_seed(0)
    model = random_decoder(config(family), 3, 40, torch.device("cpu"), torch.float32)
    tokens, position, expected = one_step(model, 2)
    plain = PlainDecoder(model, 2, CONTEXT, attention=attention)
    model_cache = model.any_cache.k_cache.clone()
    actual = plain(tokens, position)
    assert model.any_cache.k_cache.equal(model_cache)  # it writes to its own
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums in another order


@torch.no_grad()
def test_sees_no_slot_after_its_position():
    torch.manual_seed(0)
    model = random_decoder(config("llama"), 2, 40, torch.device("cpu"), torch.float32)
    tokens, _, expected = one_step(model, 2, context=10)
    plain = PlainDecoder(model, 2, CONTEXT)
    for attention in ATTENTIONS:
        actual = plain.copied(attention)(tokens, torch.tensor([9]))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_golden_is_the_exact_step_and_changes_nothing(dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(plain_decoder, "GOLDEN_ELEMENTS", 7 * 64)  # 96 rows of 64, in parts
    model = random_decoder(config("qwen2"), 2, 40, torch.device("cpu"), dtype)
    plain = PlainDecoder(model, 2, CONTEXT)
    tokens, position = torch.tensor([5, 80]), torch.tensor([CONTEXT - 1])
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    golden = plain.golden(tokens, position)
    assert golden.dtype == torch.float64
    assert all(buffer.equal(before[name]) for name, buffer in plain.named_buffers())
    exact = plain.double()(tokens, position)  # its output alone is rounded, to float32
    assert relative_error(exact, golden) < 1e-7


def test_the_step_compiles_in_one_graph():
    torch.manual_seed(0)
    model = random_decoder(config("llama"), 2, 40, torch.device("cpu"), torch.float32)
    plain = PlainDecoder(model, 2, CONTEXT)
    tokens, position = torch.tensor([5, 80]), torch.tensor([CONTEXT - 1])
    for attention in ATTENTIONS:
        decoder = plain.copied(attention)
        compiled = torch.compile(decoder, fullgraph=True, dynamic=False, backend="aot_eager")
        with torch.no_grad():
            assert compiled(tokens, position).equal(decoder(tokens, position))


def test_random_models_have_no_plain_vectors():
    model = random_decoder(config("qwen2"), 1, 40, torch.device("cpu"), torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.unique().numel() > parameter.numel() / 2, name


def test_refuses_a_window_below_the_context():
    windowed = dataclasses.replace(config("llama"), sliding_window=8, windowed_layers=(1,))
    model = random_decoder(windowed, 1, 40, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="context must be at most the window of 8, got 9"):
        PlainDecoder(model, 1, 9)
    with pytest.raises(ValueError, match="attention must be one of sdpa, matmul, got 'flash'"):
        PlainDecoder(model, 1, 8, attention="flash")
