"""What accelerate refuses, and what an accelerated model refuses; errors leave it as it was."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from fastshard.integrations.transformers import accelerate
from tiny_transformers import CACHE, random_tokens, tiny_model

TOKENS = random_tokens(2, 6)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


class Quantised(nn.Linear):
    pass


class QuantisedTensor(torch.Tensor):
    pass


def set_attention(model, name, value):
    setattr(model.model.layers[1].self_attn, name, value)
    return model


def with_quantised_weight():
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantisedTensor))
    return linear


def with_attentions():
    model = tiny_model("llama", attn_implementation="eager")
    model.config.output_attentions = True
    return model


def with_hook(register):
    model = tiny_model("qwen3")
    register(model.model.layers[1])
    return model


def with_patched(name):
    model = tiny_model("qwen3")
    module = model.get_submodule(name)
    module.forward = module.forward
    return model


def with_subclass(name):
    model = tiny_model("qwen3")
    module = model.get_submodule(name)
    module.__class__ = type("Another", (type(module),), {"__module__": "elsewhere"})
    return model


REFUSALS = {
    "another model": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).eval(),
        TypeError,
        "model must be a transformers model with one of LlamaModel, MistralModel, Qwen2Model, "
        "Qwen3Model, got GPT2LMHeadModel",
    ),
    "no model": (lambda: nn.Linear(2, 2), TypeError, "Qwen3Model, got Linear"),
    "training": (
        lambda: tiny_model("llama").train(),
        ValueError,
        r"model must be in eval mode: call model.eval\(\) first, got training mode",
    ),
    "quantised layer": (
        lambda: set_attention(tiny_model("llama"), "k_proj", Quantised(64, 32)),
        TypeError,
        r"layers.1.self_attn.k_proj must be torch.nn.Linear, not .* got [^ ]*Quantised",
    ),
    "quantised weight": (
        lambda: set_attention(tiny_model("llama"), "o_proj", with_quantised_weight()),
        TypeError,
        "layers.1.self_attn.o_proj.weight must be a plain tensor, not quantised, got Quantised",
    ),
    "two devices": (
        lambda: set_attention(tiny_model("mistral"), "o_proj", nn.Linear(64, 64, device="meta")),
        ValueError,
        "model must be on one device, got cpu, meta",
    ),
    "layers that differ": (
        lambda: set_attention(tiny_model("mistral"), "k_proj", nn.Linear(64, 32).half()),
        ValueError,
        "k_proj must be like q_proj, .*float32 .*, got .*float16",
    ),
    "attentions": (with_attentions, ValueError, "config.output_attentions must be False"),
    "head dim": (
        lambda: tiny_model("qwen3", head_dim=12),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 12",
    ),
    "hook": (
        lambda: with_hook(lambda layer: layer.mlp.register_forward_hook(print)),
        ValueError,
        "model.layers.1.mlp must have no forward hooks to be replaced, got 1",
    ),
    "hook of accelerate": (
        lambda: with_hook(lambda layer: setattr(layer, "_hf_hook", object())),
        ValueError,
        "no hooks of the package accelerate, .* got object of model.layers.1",
    ),
}
REFUSALS |= {
    f"patched {name}": (
        partial(with_patched, name),
        ValueError,
        f"^{name} must have the forward of its class to be replaced, got <bound method",
    )
    for name in ("model.layers.1.self_attn", "model.norm", "lm_head")
}
LAYER_PARTS = ("self_attn", "self_attn.k_norm", "mlp", "input_layernorm")
REFUSALS |= {
    f"subclass {name}": (
        partial(with_subclass, f"model.{name}"),
        TypeError,
        f"^{name} must be of transformers.models.qwen3.modeling_qwen3, got elsewhere.Another$",
    )
    for name in ("norm", "layers.1", *(f"layers.1.{part}" for part in LAYER_PARTS))
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_model_as_it_is(case):
    build, error, text = REFUSALS[case]
    model = build()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=text):
        accelerate(model)
    assert dict(model.named_modules()) == modules
    assert not any("fastshard" in name for name in vars(model))
    if case != "no model":
        assert model.config._attn_implementation != "fastshard"


def test_hooks_that_go_on_working_are_no_refusal():
    model, seen = tiny_model("llama"), []
    for module in (model, model.model, model.model.layers[0], model.model.embed_tokens):
        module.register_forward_hook(lambda *_: seen.append(1))
    logits(accelerate(model))
    assert len(seen) == 4


def test_training_and_gradients_are_errors():
    model = accelerate(tiny_model("llama"))
    model(TOKENS)  # no gradient is asked for, so none is refused
    embeddings = model.model.embed_tokens(TOKENS).requires_grad_()
    text = "attention 'fastshard' computes no gradients: .* 'eager' or 'sdpa'"
    with pytest.raises(RuntimeError, match=text):
        model(inputs_embeds=embeddings)
    with pytest.raises(RuntimeError, match=r"must be in eval mode: call model.eval\(\), or .*undo"):
        model.train()(TOKENS)


def test_weights_of_attention_are_an_error():
    model = accelerate(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"output_attentions must be False .* 'eager' can do it"):
        model(TOKENS, output_attentions=True)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_masks_of_other_implementations_are_read(name):
    model = accelerate(tiny_model("mistral"))
    expected = logits(model)
    model.set_attn_implementation(name)
    torch.testing.assert_close(logits(model), expected)


def test_masks_that_are_not_known_are_an_error():
    model = accelerate(tiny_model("llama"))
    model.config._attn_implementation = "flash_attention_2"
    text = "must be one of fastshard, sdpa, eager, whose masks it reads, got 'flash_attention_2'"
    with pytest.raises(ValueError, match=text):
        logits(model)


def test_paged_caches_are_an_error():
    class PagedAttentionCache:  # transformers' has no base in common with its other caches
        pass

    model, x = accelerate(tiny_model("llama")), torch.zeros(1, 2, 64)
    arguments = {"position_embeddings": model.model.rotary_emb(x, torch.arange(2)[None])}
    text = "must be a transformers Cache for attention 'fastshard', got PagedAttentionCache; .*sdpa"
    with pytest.raises(TypeError, match=text):
        model.model.layers[0].self_attn(x, cache=PagedAttentionCache(), **arguments)


def test_a_layer_of_a_stand_in_cannot_be_replaced():
    model = accelerate(tiny_model("llama"))
    text = r"o_proj of an accelerated model cannot be replaced.*undo\(model\) first"
    with pytest.raises(RuntimeError, match=text):
        model.model.layers[0].self_attn.o_proj = nn.Linear(64, 64)


def test_a_full_static_cache_is_an_error():
    model = accelerate(tiny_model("llama"))
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(TOKENS, **{CACHE: cache})
        text = "the cache must have room for all tokens: 6 of its 8 slots are used, got 3 tokens"
        with pytest.raises(ValueError, match=text):
            model(TOKENS[:, :3], **{CACHE: cache})
        assert cache.get_seq_length() == 6


def test_the_extra_is_named_where_it_is_missing():
    module = "fastshard.integrations.transformers"
    code = f"import sys; sys.modules['transformers'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    text = f"ImportError: {module} needs transformers: pip install 'fastshard[transformers]'"
    assert text in done.stderr
