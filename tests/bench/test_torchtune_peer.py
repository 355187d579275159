"""torchtune's modules on our weights compute the case: else a comparison of times means nothing."""

import dataclasses
import sys

import pytest
import torch

from fastshard import ModelConfig
from fastshard.bench import command, torchtune_peer
from fastshard.bench.case import Bench, Settings, Unavailable
from fastshard.bench.decode import random_model
from fastshard.bench.plain_decoder import PlainDecoder
from fastshard.bench.plain_prefill import PlainPrefill
from fastshard.bench.presets import PRESETS
from fastshard.bench.timing import relative_error
from fastshard.bench.torchtune_peer import TorchtuneDecoder

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # 4 of them are not the hidden size
    "max_position_embeddings": 40,
    "rms_norm_eps": 0.01,
    "rope_theta": 100.0,
}
MODELS = {name: PRESETS[name] | TINY for name in ("llama-3.2-1b", "llama-2-7b", "qwen2.5-0.5b")}
# Of 40 positions a wavelength is long enough to be scaled only where the old context is short.
SCALING = {"factor": 4.0, "original_max_position_embeddings": 10}
MODELS["llama-3.2-1b"]["rope_scaling"] = PRESETS["llama-3.2-1b"]["rope_scaling"] | SCALING
SLOTS = 17


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    config = ModelConfig.from_dict(MODELS[request.param])
    return random_model(config, 3, 30, CPU, torch.float32).model


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_a_step_over_the_models_keys(model, is_accelerated):
    decoder = TorchtuneDecoder(model, 2, SLOTS, is_accelerated=is_accelerated)
    layer = type(decoder._decoder.layers[0]).__module__.partition(".")[0]
    assert layer == ("fastshard" if is_accelerated else "torchtune")
    tokens = torch.tensor([5, 70])
    golden = PlainDecoder(model, 2, SLOTS).golden(tokens, torch.tensor([SLOTS - 1]))
    for _ in range(3):  # at the same slot each time
        logits = decoder.step(tokens)
        assert logits.dtype == torch.float32
        assert relative_error(logits, golden) < 1e-5
    assert relative_error(decoder.step(tokens.flip(0)), golden) > 0.1


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_a_prefill(model, is_accelerated):
    decoder = TorchtuneDecoder(model, 2, SLOTS, is_accelerated=is_accelerated)
    tokens = torch.randint(96, (2, SLOTS))
    golden = PlainPrefill(PlainDecoder(model, 2, SLOTS)).golden(tokens)
    for _ in range(2):  # from the first slot each time
        assert relative_error(decoder.prefill(tokens), golden) < 1e-5
    last = PlainDecoder(model, 2, SLOTS)
    for theirs, layer in zip(decoder._decoder.layers, last.layers, strict=True):
        layer.k_cache.copy_(theirs.attn.kv_cache.k_cache)
        layer.v_cache.copy_(theirs.attn.kv_cache.v_cache)
    step = last.golden(tokens[:, -1], torch.tensor([SLOTS - 1]))
    assert relative_error(step, golden) < 1e-5  # so the caches hold the prompt


def test_a_captured_step_goes_through_the_adapters(model, monkeypatch):
    from fastshard.integrations.torchtune import captured

    keys = []
    key_of = captured._key
    monkeypatch.setattr(captured, "is_gpu", lambda device: True)
    monkeypatch.setattr(captured, "_key", lambda *a: keys.append(key_of(*a)))
    decoder = TorchtuneDecoder(model, 2, SLOTS, is_accelerated=True, is_captured=True)
    tokens = torch.tensor([5, 70])
    golden = PlainDecoder(model, 2, SLOTS).golden(tokens, torch.tensor([SLOTS - 1]))
    for _ in range(2):
        assert relative_error(decoder.step(tokens), golden) < 1e-5
    assert keys[0] == keys[1]  # so the second step would be captured
    assert keys[0] is not None


def test_weights_are_shared_and_the_models_caches_kept(model):
    caches = [layer.attn.kv_cache for layer in model.layers.values()]
    keys = [cache.k_cache.clone() for cache in caches]
    decoder = TorchtuneDecoder(model, 2, SLOTS)
    decoder.prefill(torch.randint(96, (2, SLOTS)))
    assert all(cache.k_cache.equal(key) for cache, key in zip(caches, keys, strict=True))
    theirs = decoder._decoder
    assert theirs.tok_embeddings.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert all(weight.is_contiguous() for weight in theirs.parameters())
    assert not any(tensor.is_meta for tensor in (*theirs.parameters(), *theirs.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts(dtype):
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    x, gate_up, down = (torch.randn(*of, dtype=dtype) for of in ((5, 24), (80, 24), (24, 40)))
    gate, up = gate_up.double().chunk(2)
    gated = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    module = torchtune_peer.feed_forward(gate_up, down)
    assert type(module).__module__.startswith("torchtune.")
    assert relative_error(module(x), gated @ down.double().T) < 2 * eps
    weight = torch.randn(24, dtype=dtype)
    module = torchtune_peer.rms_norm(weight, 0.5)
    assert type(module).__module__.startswith("torchtune.")
    golden = torch.nn.functional.rms_norm(x.double(), (24,), weight.double(), 0.5)
    assert relative_error(module(x), golden) < eps


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu"}, {"qk_norm": True}, {"rotary_dim": 8}, {"rope_interleaved": False}],
    ids=str,
)
def test_models_that_torchtune_has_not(changes):
    config = ModelConfig.from_dict(MODELS["llama-3.2-1b"])
    model = random_model(dataclasses.replace(config, **changes), 1, 30, CPU, torch.float32).model
    with pytest.raises(Unavailable, match="torchtune has no such model"):
        TorchtuneDecoder(model, 1, SLOTS)


def test_without_torchtune_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtune", None)
    settings = Settings(models=("qwen2.5-0.5b",), batches=(2,), peers=("torchtune",))
    bench = Bench(CPU, type("Clock", (), {"l2_bytes": 1}), None, settings)
    (problem,) = command.BENCHMARKS["mlp"](bench)
    (case,) = problem.cases()
    (variant,) = (variant for variant in case.variants if variant.is_peer)
    assert variant.name == "torchtune"
    with pytest.raises(Unavailable, match=r"pip install 'fastshard\[torchtune\]'"):
        variant.prepare()
