"""Replacements: stand-ins have the old modules' parameters, and hand them back."""

import copy

import pytest
import torch
from torch import nn

from fastshard.integrations.replacement import Replacements
from fastshard.nn.linear import PackedLinears


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)


class PackedPair(PackedLinears):
    def __init__(self, pair: Pair):
        super().__init__()
        self.adopt({"a": pair.a, "b": pair.b})

    def forward(self, x):
        return nn.functional.linear(x, self.packed_weight, self.packed_bias)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Pair(), nn.Linear(10, 2))


def replace(model: nn.Module) -> None:
    done = Replacements()
    done.put(model, "0", PackedPair(model[0]))
    done.keep_in(model)


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def test_a_stand_in_keeps_state_and_result(x):
    model = build().eval()
    expected, state = model(x), {n: v.clone() for n, v in model.state_dict().items()}
    replace(model)
    assert isinstance(model[0], PackedPair)
    assert not model[0].training
    assert len(Replacements.of(model)) == 1
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def materialize(model):
    model.to_empty(device="cpu")
    with torch.no_grad():  # memory as it was found may hold NaN
        for parameter in model.parameters():
            parameter.normal_()


CHANGES = {
    "nothing": lambda model: model,
    "double": lambda model: model.double(),
    "from meta": materialize,
    "train": lambda model: model.train(),
    "load": lambda model: model.load_state_dict(
        {n: torch.randn_like(v) for n, v in model.state_dict().items()}
    ),
    "edit": lambda model: model[0].a.weight.data.zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_undo_hands_parameters_back(change):
    model = build().eval()
    if change == "from meta":
        model.to("meta")
    old, parameters = model[0], dict(model.named_parameters())
    replace(model)
    CHANGES[change](model)
    state = model.state_dict()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    Replacements.of(model).undo(model)
    assert model[0] is old
    assert model[0].training is model.training
    assert Replacements.of(model) is None
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    if change != "from meta":  # no tensor can be on another kind of device and stay the same object
        assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_is_undone_alone(x):
    model = build()
    expected = model(x)
    replace(model)
    twin = copy.deepcopy(model)
    Replacements.of(twin).undo(twin)
    assert isinstance(twin[0], Pair)
    assert isinstance(model[0], PackedPair)
    assert torch.equal(twin(x), expected)
    twin[0].a.weight.data.zero_()
    torch.testing.assert_close(model(x), expected)


def test_other_parameters_are_no_stand_in():
    model = build()
    text = r"0 must have the parameters \['a.bias', .*\], got \['bias', 'weight'\]"
    with pytest.raises(ValueError, match=text):
        Replacements().put(model, "0", nn.Linear(8, 10))
    assert isinstance(model[0], Pair)
