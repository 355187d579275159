"""accelerate and undo of transformers models: parameters, settings, saving, refusals."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification

from fastshard.integrations.transformers import accelerate, undo
from fastshard.integrations.transformers.modules import MLP, Attention, Projection, RMSNorm, Rotary
from tiny_transformers import CACHE, FAMILIES, random_tokens, tiny_model, twin

TOKENS = random_tokens(2, 6)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def storage_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [m.packed_weight for m in model.modules() if isinstance(m, (Attention, MLP))]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_stays_and_undo_gives_the_same_bits(family):
    model = tiny_model(family)
    before, expected = twin(model), logits(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    size = storage_bytes(model)

    assert accelerate(model) is model
    layer = model.model.layers[0]
    kinds = {"self_attn": Attention, "mlp": MLP, "input_layernorm": RMSNorm}
    assert all(type(layer.get_submodule(name)) is kind for name, kind in kinds.items())
    assert isinstance(layer, type(before.model.layers[0]))
    assert (type(model.lm_head), type(model.model.rotary_emb)) == (Projection, Rotary)
    assert model.config._attn_implementation == "fastshard"
    assert not any(p.requires_grad for p in model.parameters())
    assert storage_bytes(model) == size  # nothing is kept twice
    state = model.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    assert not torch.equal(logits(model), expected)  # other kernels, other roundings

    assert undo(model) is model
    assert torch.equal(logits(model), expected)
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == before.config._attn_implementation
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    assert vars(model).keys() == vars(before).keys()


def test_twice_is_once():
    model = accelerate(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    assert accelerate(model).model.layers[0].self_attn is attention
    assert undo(undo(model)) is model
    assert not isinstance(model.model.layers[0].self_attn, Attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_as_plain_ones(family, tmp_path):
    model = tiny_model(family, torch.bfloat16)
    plain = twin(model)
    plain.save_pretrained(tmp_path / "plain")
    accelerate(model).save_pretrained(tmp_path / "fast")
    for name in ("config.json", "generation_config.json"):
        texts = [json.loads((tmp_path / kind / name).read_text()) for kind in ("plain", "fast")]
        assert texts[0] == texts[1]
    plain, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype="auto")
        for kind in ("plain", "fast")
    )
    assert torch.equal(logits(loaded), logits(plain))
    assert model.generation_config.disable_compile  # as before it was saved


def test_undo_hands_changes_back(tmp_path):
    model, other = tiny_model("qwen2"), tiny_model("qwen2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    accelerate(model).load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other))
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[1].mlp.packed_weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(undo(model)), logits(other.to(torch.bfloat16)))


def test_tied_weights_stay_tied():
    model = accelerate(tiny_model("llama"))
    for changed in (model, copy.deepcopy(model), model.to(torch.float16), undo(model)):
        assert changed.lm_head.weight is changed.model.embed_tokens.weight


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_stands_alone(how, tmp_path):
    model = accelerate(tiny_model("mistral"))
    expected = logits(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits(undo(copied)), logits(loaded))
    assert isinstance(model.model.layers[0].mlp, MLP)


def test_other_heads_and_no_head():
    torch.manual_seed(0)
    config = tiny_model("llama").config
    for cls in (LlamaModel, LlamaForSequenceClassification):
        model = cls(config).eval()
        with torch.no_grad():
            expected = model(TOKENS[:1])[0]
            torch.testing.assert_close(accelerate(model)(TOKENS[:1])[0], expected)
        undo(model)


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
