"""Tokens of an accelerated transformers model over a static cache: one op each, or the layers."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, StaticCache

from fastshard import ops
from fastshard.integrations.transformers import accelerate, undo
from helpers import assert_as_accurate
from stepping_transformers import build, count_steps, generate, prompt
from tiny_transformers import CACHE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SLOTS = 32


@pytest.fixture
def steps(monkeypatch):
    return count_steps(monkeypatch)


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_by_steps(family, batch, padded, steps):
    model, inputs = build(family), prompt(batch, padded)
    expected = generate(model, inputs)
    found = generate(accelerate(model), inputs)
    assert steps == [batch] * 5
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    for ours, theirs in zip(*_layers(found, expected), strict=True):
        assert ours.cumulative_length == theirs.cumulative_length == 12
        for name in ("keys", "values"):  # but of the padding, which means nothing
            cache, other = (getattr(layer, name)[:, :, padded:] for layer in (ours, theirs))
            torch.testing.assert_close(cache, other, rtol=1e-4, atol=1e-5)


def _layers(*outputs):
    return [getattr(out, CACHE).layers for out in outputs]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_errs_as_little_as_eager(family, dtype, device):
    inputs = prompt(2, 3)
    follow = torch.tensor([[5], [150]])
    naive = build(family, dtype).to(device)
    models = [copy.deepcopy(naive).double(), naive, accelerate(copy.deepcopy(naive))]
    golden, eager, actual = (_second_logits(m, inputs, follow, device) for m in models)
    assert actual.dtype == dtype
    assert_as_accurate(actual, golden, eager)


@torch.no_grad()
def _second_logits(model, inputs, follow, device):
    """Of one more token after a padded prompt, over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**inputs, position_ids=positions, **{CACHE: cache})
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    arguments = model.prepare_inputs_for_generation(
        torch.cat([inputs["input_ids"], follow.to(device)], -1),
        next_sequence_length=1,
        **{CACHE: cache},
        attention_mask=mask,
        position_ids=positions[:, -1:] + 1,
    )
    return model(**arguments).logits


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"num_attention_heads": 8, "head_dim": 32}, {}),  # no such head_dim in the op
        ({}, {"cache_implementation": "dynamic"}),
        ({}, {"output_hidden_states": True}),
        ({}, {"use_cache": False, "cache_implementation": None}),
        ({"family": "mistral", "sliding_window": 8}, {}),
        ({"mlp_bias": True}, {}),
        (
            {"tie_word_embeddings": True},
            {"prompt_lookup_num_tokens": 2, "cache_implementation": None},
        ),
    ],
    ids=["head_dim", "dynamic", "hidden states", "no cache", "window", "mlp_bias", "lookup"],
)
@pytest.mark.filterwarnings("ignore:the MLPs are left:RuntimeWarning")
def test_other_calls_go_through_the_layers(changes, settings, steps):
    model, inputs = build(**changes), prompt()
    expected = generate(model, inputs, **settings)
    found = generate(accelerate(model), inputs, **settings)
    assert steps == []
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("batch", [9, 2])
def test_padding_in_the_middle_and_large_batches_go_through_the_layers(batch, steps):
    model, inputs = build(), prompt(batch)
    if batch == 2:
        inputs["attention_mask"][0, 3] = 0
    expected = generate(model, inputs)
    found = generate(accelerate(model), inputs)
    assert steps == []
    assert torch.equal(found.sequences, expected.sequences)
    smaller = generate(model, prompt())  # the same model takes steps again
    assert steps == [1] * 5
    undo(model)
    assert torch.equal(smaller.sequences, generate(model, prompt()).sequences)


def test_beams_step_over_the_caches_that_are_theirs(steps):
    model, inputs = build(), prompt(2, 3)
    expected = generate(model, inputs, num_beams=3)
    found = generate(accelerate(model), inputs, num_beams=3)
    assert steps == [6] * 5
    assert torch.equal(found.sequences, expected.sequences)


def test_a_hook_sees_every_token(steps):
    model, seen = accelerate(build()), []
    handle = model.model.layers[1].register_forward_hook(lambda *arguments: seen.append(1))
    expected = generate(model, prompt())
    assert (steps, len(seen)) == ([], 6)
    handle.remove()
    assert torch.equal(generate(model, prompt()).sequences, expected.sequences)
    assert steps == [1] * 5


def _cast(model):
    model.__dict__.pop("_cache", None)  # transformers 5.4 goes on with it, in the old dtype
    model.to(torch.bfloat16)


CHANGES = {
    "to": _cast,
    "edit": lambda model: model.model.layers[2].self_attn.q_proj.weight.mul_(-1),
    "norm": lambda model: model.model.layers[1].input_layernorm.weight.mul_(2),
    "load": lambda model: model.load_state_dict(
        {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    ),
    "assign": lambda model: model.load_state_dict(
        {name: tensor + 0.01 for name, tensor in model.state_dict().items()}, assign=True
    ),
    "assign one": lambda model: model.load_state_dict(
        {"model.layers.1.input_layernorm.weight": torch.full((128,), 2.0)},
        strict=False,
        assign=True,
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_follow_changes_of_the_weights(change, steps):
    model = accelerate(build())
    first = generate(model, prompt())
    with torch.no_grad():
        change(model)
    found = generate(model, prompt())
    assert steps == [1] * 10
    assert not torch.equal(torch.stack(found.logits), torch.stack(first.logits))
    expected = generate(accelerate(undo(model)), prompt())
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_copy_steps_by_itself(steps):
    model = accelerate(build())
    generate(model, prompt())
    twin = copy.deepcopy(model)
    assert twin.forward._model is twin
    with torch.no_grad():
        model.model.norm.weight.zero_()
    found = generate(twin, prompt())
    assert steps == [1] * 10
    assert torch.equal(found.sequences, generate(build(), prompt()).sequences)


def test_a_gpu_that_cannot_hold_the_launch(monkeypatch, steps):
    model = build()
    expected = generate(model, prompt())

    def refuse(*arguments, **keywords):
        raise RuntimeError("decode_step: cannot be resident: 9 blocks\nwhere")

    monkeypatch.setattr(ops, "decode_step", refuse)
    accelerate(model)
    text = r"^tokens go through the layers: decode_step: cannot be resident: 9 blocks$"
    with pytest.warns(RuntimeWarning, match=text) as warned:
        found = generate(model, prompt())
    assert torch.equal(found.sequences, expected.sequences)
    assert (steps, len(warned)) == ([1], 1)
    generate(model, prompt())
    assert steps == [1]


def test_other_errors_are_not_swallowed(monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("a launch failed")

    monkeypatch.setattr(ops, "decode_step", fail)
    with pytest.raises(RuntimeError, match="a launch failed"):
        generate(accelerate(build()), prompt())


@torch.no_grad()
def test_calls_by_hand(steps):
    plain, model, inputs = build(), accelerate(build()), prompt(2)["input_ids"]
    caches = [StaticCache(config=plain.config, max_cache_len=9) for _ in range(2)]
    for each, cache in zip((plain, model), caches, strict=True):
        each(inputs, **{CACHE: cache})
    follow = torch.tensor([[5], [150]])
    first = model(follow, **{CACHE: caches[1]}).logits
    kept = first.clone()
    torch.testing.assert_close(first, plain(follow, **{CACHE: caches[0]}).logits)
    second = model(input_ids=follow, **{CACHE: caches[1]}, logits_to_keep=1).logits
    torch.testing.assert_close(second, plain(follow, **{CACHE: caches[0]}).logits)
    assert steps == [2, 2]
    assert torch.equal(first, kept)  # not overwritten by the second
    text = "room for all tokens: 9 of its 9 slots are used, got 1 tokens more"
    with pytest.raises(ValueError, match=text):
        model(follow, **{CACHE: caches[1]})
    out = model(follow, **{CACHE: DynamicCache(config=plain.config)}, return_dict=False)
    assert isinstance(out, tuple)


@torch.no_grad()
def test_tokens_that_are_columns_of_others(steps):
    plain, model, tokens = build(), accelerate(build()), prompt(2)["input_ids"]
    caches = [StaticCache(config=plain.config, max_cache_len=SLOTS) for _ in range(2)]
    for part in (tokens, tokens[:, :1], tokens[:, -1:]):
        found, expected = (
            each(part, **{CACHE: cache}).logits
            for each, cache in zip((model, plain), caches, strict=True)
        )
        torch.testing.assert_close(found, expected)
    assert steps == [2, 2]


@torch.no_grad()
def test_a_config_that_wants_hidden_states_gets_them(steps):
    model = accelerate(build())
    cache = StaticCache(config=model.config, max_cache_len=9)
    model(prompt()["input_ids"], **{CACHE: cache})
    model.config.output_hidden_states = True
    out = model(torch.tensor([[5]]), **{CACHE: cache})
    assert steps == []
    assert len(out.hidden_states) == 4


def test_forward_has_the_signature_of_the_class_until_undo():
    model = accelerate(build())
    assert inspect.signature(model.forward) == inspect.signature(build().forward)
    undo(model)
    assert "forward" not in model.__dict__
