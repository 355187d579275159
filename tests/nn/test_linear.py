"""PackedLinears: q, k, v, w1 and w3 stay views of one tensor, whatever is done to the module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastshard.nn import FeedForward, MultiHeadAttention
from fastshard.nn.linear import PackedLinears

NAMES = {MultiHeadAttention: ("q_proj", "k_proj", "v_proj"), FeedForward: ("w1", "w3")}


def build(kind: type, **placed) -> nn.Module:
    torch.manual_seed(0)
    if kind is FeedForward:
        return FeedForward(64, 48, **placed)
    module = MultiHeadAttention(
        embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=24, qkv_bias=True, **placed
    )
    module.packed_bias.normal_()
    return module


def assert_packed(module: nn.Module) -> None:
    """Every packed row belongs to one parameter, in the documented order, in the same memory."""
    children = [getattr(module, name) for name in NAMES[type(module)]]
    for name, packed in (("weight", module.packed_weight), ("bias", module.packed_bias)):
        parameters = [getattr(child, name) for child in children]
        if packed is None:
            assert all(parameter is None for parameter in parameters)
            continue
        assert packed.is_contiguous()
        for parameter in parameters:
            assert isinstance(parameter, nn.Parameter)
            assert parameter.untyped_storage()._cdata == packed.untyped_storage()._cdata
        if packed.is_meta:
            continue
        if isinstance(module, FeedForward):
            rows = [row for pair in zip(*parameters, strict=True) for row in pair]
        else:
            rows = [row for parameter in parameters for row in parameter]
        assert [row.data_ptr() for row in rows] == [row.data_ptr() for row in packed]


def storage_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that the module reaches, each storage once."""
    storages = {}
    for child in module.modules():
        for value in [*child.__dict__.values(), *child._parameters.values()]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture(params=[MultiHeadAttention, FeedForward], ids=["attention", "mlp"])
def kind(request):
    return request.param


CHANGES = {
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.bfloat16),
    "to and back": lambda module: module.to(torch.bfloat16).float(),
    "no change": lambda module: module.to("cpu"),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "to meta": lambda module: module.to("meta"),
    "share_memory": lambda module: module.share_memory(),
    "parent": lambda module: nn.Sequential(module).half()[0],
    "load": lambda module: module.load_state_dict(module.state_dict()),
    "assign": lambda module: module.load_state_dict(
        {name: value.double() for name, value in module.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_stay_views(change, kind):
    module = build(kind)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    changed = change(module)
    module = changed if isinstance(changed, nn.Module) else module
    assert_packed(module)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    assert storage_bytes(module) == size  # no second copy
    if change not in (CHANGES["to_empty"], CHANGES["to meta"]):
        for name, value in module.state_dict().items():
            # bfloat16 rounds at 2^-9 of the value
            torch.testing.assert_close(value.float(), expected[name], rtol=2**-8, atol=0)


def test_a_move_touches_each_tensor_once(kind):
    module, moved = build(kind), []

    def move(tensor):
        moved.append(tensor.numel())
        return tensor.half()

    module._apply(move)
    assert sum(moved) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_parameters_stay_views_on_cuda(kind, device):
    module = build(kind)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    module.cuda().half()
    assert_packed(module)
    assert module.packed_weight.is_cuda
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name].half().cuda())


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_packed_and_independent(method, kind):
    module = build(kind)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    if method == "deepcopy":
        twin = copy.deepcopy(module)
    elif method == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert_packed(twin)
    assert_packed(module)
    assert storage_bytes(twin) == storage_bytes(module)
    module.packed_weight.zero_()
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())


def test_edits_of_a_parameter_reach_the_forward_pass(kind):
    module = build(kind)
    x = torch.randn(1, 3, 64)
    call = (lambda: module(x, x)) if kind is MultiHeadAttention else (lambda: module(x))
    before = call()
    child = getattr(module, NAMES[kind][-1])  # v, or up: the output is linear in it
    with torch.no_grad():
        child.weight.mul_(2)
        if child.bias is not None:
            child.bias.mul_(2)
    torch.testing.assert_close(call(), 2 * before)
    child.weight = nn.Parameter(child.weight / 2)  # assigning writes through, too
    if child.bias is not None:
        child.bias = nn.Parameter(child.bias / 2)
    torch.testing.assert_close(call(), before)
    child.weight.data.zero_()
    if child.bias is not None:
        child.bias.data.zero_()
    assert not call().any()
    assert_packed(module)
    with pytest.raises(ValueError, match=r"weight must have shape \[48, 64\], got \[1, 64\]"):
        child.weight = nn.Parameter(torch.ones(1, 64))


def test_assign_in_several_parts_from_meta(kind):
    source, module = build(kind).half(), build(kind, device="meta")
    for name, value in source.state_dict().items():
        module.load_state_dict({name: value}, assign=True, strict=False)
    assert_packed(module)
    assert module.packed_weight.dtype == torch.float16
    assert all(
        torch.equal(value, source.state_dict()[n]) for n, value in module.state_dict().items()
    )
    assert storage_bytes(module) == storage_bytes(source)


def test_a_move_between_parts_keeps_the_loaded_one(kind):
    source, module = build(kind), build(kind, device="meta")
    state = source.state_dict()
    first = f"{NAMES[kind][0]}.weight"
    module.load_state_dict({first: state.pop(first)}, assign=True, strict=False)
    module.half()
    module.load_state_dict({n: v.half() for n, v in state.items()}, assign=True, strict=False)
    assert_packed(module)
    expected = source.half().state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in module.state_dict().items())


def test_one_assigned_part_takes_the_dtype_of_the_others(kind):
    module = build(kind).half()
    name = f"{NAMES[kind][0]}.weight"
    value = torch.randn(module.state_dict()[name].shape)
    module.load_state_dict({name: value}, assign=True, strict=False)
    assert_packed(module)
    assert torch.equal(module.state_dict()[name], value.half())


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((str(function), args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_reads_the_packed_tensor_and_copies_none(kind, dtype):
    module = build(kind, dtype=dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    with Recorder() as recorder:
        module(x, x) if kind is MultiHeadAttention else module(x)
    names = {name for name, _ in recorder.calls}
    forbidden = ("_to_copy", "cat", "stack", "clone", "copy_", "contiguous")
    assert not [name for name in names if name.split(".")[1] in forbidden]
    op = "fastshard.linear.default" if kind is MultiHeadAttention else "fastshard.fused_mlp.default"
    pointers = [args[1].data_ptr() for name, args in recorder.calls if name == op]
    assert module.packed_weight.data_ptr() in pointers
    assert len(names & {"fastshard.linear.default", "fastshard.fused_mlp.default"}) == 1


class Adopted(PackedLinears):
    """Packs the layers that it is given."""

    def __init__(self, interleaved=False, **layers):
        super().__init__()
        self.adopt(layers, interleaved=interleaved)


def linears(*sizes: int, bias: bool = True, **placed) -> dict[str, nn.Linear]:
    torch.manual_seed(1)
    return {f"l{i}": nn.Linear(8, size, bias=bias, **placed) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_adopted_layers_are_views(interleaved, bias):
    layers = linears(6, 6, bias=bias) if interleaved else linears(6, 4, 2, bias=bias)
    parameters = {name: dict(layer.named_parameters()) for name, layer in layers.items()}
    before = {name: {k: p.clone() for k, p in of.items()} for name, of in parameters.items()}
    module = Adopted(interleaved, **layers)
    for name in ("weight", "bias") if bias else ("weight",):
        values = [before[layer][name] for layer in layers]
        rows = torch.stack(values, 1).flatten(0, 1) if interleaved else torch.cat(values)
        packed = getattr(module, f"packed_{name}")
        assert torch.equal(packed, rows)
        for layer, of in parameters.items():
            assert getattr(layers[layer], name) is of[name]  # the same object
            assert torch.equal(of[name], before[layer][name])
            assert of[name].requires_grad
            assert not module.get_submodule(layer).get_parameter(name).requires_grad
            assert of[name].untyped_storage()._cdata == packed.untyped_storage()._cdata
    assert (module.packed_bias is None) == (not bias)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    assert storage_bytes(nn.ModuleList([module, *layers.values()])) == size  # no second copy


@pytest.mark.parametrize(
    ("layers", "interleaved", "text"),
    [
        (linears(6) | {"b": nn.Linear(9, 6)}, False, r"b must be like l0, .*8\].* got \[\*, 9\]"),
        (linears(6) | {"b": nn.Linear(8, 6).half()}, False, r"got .*float16 on cpu with a bias"),
        (linears(6) | {"b": nn.Linear(8, 6, bias=False)}, False, r"got .* with no bias"),
        (linears(6) | {"b": nn.Linear(8, 6, device="meta")}, False, r"got .* on meta"),
        (linears(6, 4), True, r"must be of one size, got \{'l0': 6, 'l1': 4\}"),
    ],
)
def test_layers_that_differ_are_not_adopted(layers, interleaved, text):
    before = {name: layer.weight.data_ptr() for name, layer in layers.items()}
    with pytest.raises(ValueError, match=text):
        Adopted(interleaved, **layers)
    assert before == {name: layer.weight.data_ptr() for name, layer in layers.items()}
