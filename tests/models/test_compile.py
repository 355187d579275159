"""Whole models under torch.compile, autocast and inference mode: eager's bits, and few graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import decoder_reference as reference
from fastshard import GeneralMHA, ModelConfig, Shard, nn
from fastshard.nn import KVCache
from helpers import assert_identical

CONFIG = {
    "vocab_size": 96,
    "embed_dim": 64,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 24,
    "max_seq_len": 48,
    "rope_base": 10000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 80,
    "num_layers": 2,
    "norm_eps": 0.01,
    "attn_dropout": 0.0,
}
PROMPT, LENGTH = 5, 12


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def build(model_id: str = "llama", start: int = 0, end: int = 1):
    config = ModelConfig.from_dict(CONFIG, model_id)
    model = GeneralMHA(config, Shard(model_id, start, end, 2), dtype=torch.float32)
    model.load_state_dict(reference.random_state(model))
    return model


def random_tokens(num_rows: int, num_tokens: int) -> Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (num_rows, num_tokens))


def caches_of(model) -> list[KVCache]:
    return [module for module in model.modules() if isinstance(module, KVCache)]


def held(model) -> list[Tensor]:
    """A copy of all keys and values in use."""
    return [
        tensor[:, :, : cache.size].clone()
        for cache in caches_of(model)
        for tensor in (cache.k_cache, cache.v_cache)
    ]


def forget(model) -> None:
    """Empty the caches; what a slot held before must not matter."""
    for cache in caches_of(model):
        cache.reset()
        cache.k_cache.fill_(torch.nan)
        cache.v_cache.fill_(torch.nan)


def decode(model, call: Callable[[int, int], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Give ``call`` the range of a prompt, then of token after token; its results, the caches.

    Three graphs are allowed: of the prompt, of the first token, and of any token.
    """
    forget(model)
    outs = []
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        with torch._dynamo.config.patch(error_on_recompile=start > PROMPT + 1):
            outs.append(call(start, end))
    return outs, held(model)


@pytest.mark.parametrize(
    ("with_positions", "model_id", "mode"),
    [(False, "llama", torch.no_grad), (True, "qwen3", torch.inference_mode)],
)
def test_a_model_that_counts_compiles_for_no_position(with_positions, model_id, mode):
    model, tokens = build(model_id), random_tokens(2, LENGTH)
    model.setup_caches(2, torch.float32)

    def step(function):
        def call(start, end):
            input_pos = torch.arange(start, end) if with_positions else None
            return function(tokens[:, start:end], input_pos=input_pos)

        return call

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        expected = decode(model, step(model))
        assert_identical(decode(model, step(compiled)), expected)
    assert model.cache_size == LENGTH


def test_a_shard_of_later_layers_compiles_for_no_position():
    model, hidden = build(start=1), torch.randn(2, LENGTH, CONFIG["embed_dim"])
    model.setup_caches(2, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = decode(model, lambda a, b: model(hidden_state=hidden[:, a:b]))
        actual = decode(model, lambda a, b: compiled(hidden_state=hidden[:, a:b]))
    assert_identical(actual, expected)


@pytest.mark.parametrize("is_masked", [False, True])
def test_an_attention_module_compiles_for_no_position(is_masked):
    rope = nn.RotaryEmbedding(24, 48)
    sizes = {"embed_dim": 64, "num_heads": 6, "num_kv_heads": 2, "head_dim": 24}
    attn = nn.MultiHeadAttention(**sizes, pos_embeddings=rope, dtype=torch.float32)
    attn.setup_cache(2, torch.float32, max_seq_len=LENGTH)
    x = torch.randn(2, LENGTH, 64)
    mask = torch.rand(2, LENGTH, LENGTH).tril() > 0.3

    def step(function):
        def call(start, end):
            rows = {"mask": mask[:, start:end]} if is_masked else {}
            return function(x[:, start:end], x[:, start:end], **rows)

        return call

    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = decode(attn, step(attn))
        assert_identical(decode(attn, step(compiled)), expected)


@pytest.mark.parametrize("is_cached", [False, True])
def test_prompts_of_any_length_and_batch_compile_once(is_cached):
    model = build()
    if is_cached:
        model.setup_caches(7, torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (num_rows, num_tokens) in enumerate([(5, 11), (3, 7), (7, 13)]):
        tokens, results = random_tokens(num_rows, num_tokens), []
        for function in (model, compiled):
            forget(model)
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
                results.append((function(tokens), held(model)))
        assert_identical(*results)


def test_inductor_decodes_as_eager():
    """The default backend: generated C++ around the ops, which are told to write in place."""
    model, tokens = build(), random_tokens(2, LENGTH)
    model.setup_caches(2, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = decode(model, lambda a, b: model(tokens[:, a:b]))
        actual = decode(model, lambda a, b: compiled(tokens[:, a:b]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    model, tokens = build(), random_tokens(2, LENGTH)
    model.setup_caches(2, torch.float32)
    with torch.no_grad():
        expected = decode(model, lambda a, b: model(tokens[:, a:b]))
        with torch.autocast("cpu", torch.bfloat16):
            actual = decode(model, lambda a, b: model(tokens[:, a:b]))
    assert_identical(actual, expected)


def test_a_model_refuses_gradients():
    model = build()
    model.requires_grad_()
    with pytest.raises(RuntimeError, match="linear is for inference only and has no gradient, got"):
        model(random_tokens(1, 3))
    with torch.no_grad():
        assert not model(random_tokens(1, 3)).requires_grad
