"""accelerate and undo of transformers models: parameters, settings, saving, refusals."""

import copy
import io
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification

from fastshard.integrations.transformers import accelerate, undo
from fastshard.integrations.transformers.modules import MLP, Attention, Projection, RMSNorm, Rotary
from tiny_transformers import FAMILIES, random_tokens, tiny_model, twin

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
