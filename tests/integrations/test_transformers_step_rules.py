"""What an accelerated transformers model must not take for a step, and what it lets go of."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM, StaticCache

from fastshard.integrations.transformers import accelerate, step
from stepping_transformers import build, count_steps, generate, prompt
from tiny_transformers import CACHE

SLOTS = 16
TOKEN = torch.tensor([[5]])


@pytest.fixture
def steps(monkeypatch):
    return count_steps(monkeypatch)


def prompted(model) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    model(prompt()["input_ids"], **{CACHE: cache})
    return cache


@torch.no_grad()
def third_logits(model, before=None, between=None, **arguments) -> torch.Tensor:
    """After a prompt and a token; the model is changed before them or between them."""
    if before is not None:
        before(model)
    cache = prompted(model)
    model(TOKEN, **{CACHE: cache})
    if between is not None:
        between(model)
    return model(TOKEN, **{CACHE: cache}, **arguments).logits


class Wrapper(nn.Module):
    """Of a layer, whose attributes it has, as tools that steer activations use it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        return 2 * self.layer(*args, **kwargs)


class Scaled(nn.Embedding):
    def forward(self, input):
        return 3 * super().forward(input)


class Doubled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.norm = norm

    def forward(self, x):
        return 2 * self.norm(x)


class Halved(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def _wrap(model):
    model.model.layers[1] = Wrapper(model.model.layers[1])


def _scale_embedding(model):
    model.model.embed_tokens.__class__ = Scaled


def _double_norm(model):
    model.model.norm = Doubled(model.model.norm)


def _swap(model):
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (1, 0, 2)])


def _transpose(model):
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()


def _patch(model):
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _shorten(model):
    model.config.num_hidden_layers = 2


BEFORE = [_wrap, _scale_embedding, _double_norm, _swap, _transpose, _patch]


@pytest.mark.parametrize("change", BEFORE)
def test_models_that_were_changed_go_through_the_layers(change, steps):
    plain, model = build(), accelerate(build())
    found = third_logits(model, before=change)
    assert steps == []
    torch.testing.assert_close(found, third_logits(plain, before=change))


@pytest.mark.parametrize("change", [_patch, _shorten])
def test_changes_between_tokens_go_through_the_layers(change, steps):
    plain, model = build(), accelerate(build())
    found = third_logits(model, between=change)
    assert steps == [1]
    torch.testing.assert_close(found, third_logits(plain, between=change))


@pytest.mark.parametrize(
    "change",
    [
        lambda norm, value: setattr(norm, "weight", nn.Parameter(value, requires_grad=False)),
        lambda norm, value: setattr(norm.weight, "data", value),
    ],
    ids=["parameter", "data"],
)
def test_weights_that_are_replaced_between_tokens_are_seen(change, steps):
    def between(model):
        change(model.model.layers[1].input_layernorm, torch.full((128,), 2.0))

    plain, model = build(), accelerate(build())
    found = third_logits(model, between=between)
    assert steps == [1, 1]
    torch.testing.assert_close(found, third_logits(plain, between=between))


def test_a_subclass_with_a_forward_of_its_own(steps):
    plain, model = build(), build()
    for each in (plain, model):
        each.__class__ = Halved
    found = third_logits(accelerate(model))
    assert steps == []
    torch.testing.assert_close(found, third_logits(plain))


def test_a_global_hook_sees_every_token(steps):
    seen, model = [], accelerate(build())
    with register_module_forward_hook(lambda module, *_: seen.append(module)):
        third_logits(model)
    assert steps == []
    assert seen.count(model.model.norm) == 3


@torch.no_grad()
def test_other_arguments_go_through_the_layers(steps):
    plain, model = build(), accelerate(build())
    ids = TOKEN.int()
    found = model(ids, **{CACHE: prompted(model)}).logits
    torch.testing.assert_close(found, plain(ids, **{CACHE: prompted(plain)}).logits)
    mask = torch.ones(1, 1, 1, SLOTS, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^attention_mask must be bool or floating, got torch"):
        model(TOKEN, **{CACHE: prompted(model)}, attention_mask=mask)
    assert steps == []


def test_gradients_are_refused_as_by_the_layers():
    model = accelerate(build())
    with torch.no_grad():
        cache = prompted(model)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^attention 'fastshard' computes no gradients"):
        model(TOKEN, **{CACHE: cache})


@torch.no_grad()
def test_a_step_keeps_no_cache_and_with_it_no_weights():
    model = accelerate(build())
    cache = prompted(model)
    model(TOKEN, **{CACHE: cache})
    assert model.forward._step is not None
    held, keys = weakref.ref(cache), weakref.ref(cache.layers[0].keys)
    del cache
    gc.collect()
    assert (held(), keys(), model.forward._step) == (None, None, None)


@torch.no_grad()
def test_a_saved_or_copied_model_has_no_step(steps):
    model = accelerate(build())
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
        cache = prompted(model)
        model(TOKEN, **{CACHE: cache})
    assert sizes[1] < sizes[0] + 10_000  # a workspace alone is more
    assert copy.deepcopy(model).forward._step is None
    assert model.forward._step is not None
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    del steps[:]
    assert torch.equal(generate(loaded, prompt()).sequences, generate(model, prompt()).sequences)
    assert steps == [1] * 10


@torch.no_grad()
def test_threads_step_over_their_own_caches(monkeypatch):
    model = accelerate(build())
    caches = [prompted(model) for _ in range(2)]
    expected = [
        model(torch.tensor([[token]]), **{CACHE: copy.deepcopy(caches[0])}) for token in (5, 9)
    ]
    is_watched = step._Step.is_watched

    def meanwhile(self):
        """Another thread takes its step between the look for ours and the step itself."""
        monkeypatch.setattr(step._Step, "is_watched", is_watched)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return is_watched(self)

    found = {}

    def other():
        with torch.no_grad():
            found[1] = model(torch.tensor([[9]]), **{CACHE: caches[1]}).logits

    monkeypatch.setattr(step._Step, "is_watched", meanwhile)
    found[0] = model(torch.tensor([[5]]), **{CACHE: caches[0]}).logits
    for i in range(2):
        assert torch.equal(found[i], expected[i].logits)
        assert int(caches[i].layers[0].cumulative_length) == 8
