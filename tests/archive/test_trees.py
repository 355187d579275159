"""Arguments and answers in files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastshard.archive import trees
from helpers import assert_identical


def there_and_back(value, path):
    trees.save(path, trees.pack(value))
    return trees.load(path).value()


@pytest.mark.parametrize(
    "value",
    [
        (torch.randn(3, 4), 5, 0.5, True, None, "text", (1, 2), [torch.arange(3)]),
        {"weights": [torch.randn(2).half(), {"bias": torch.tensor(1.5)}], "eps": 1e-5},
        (torch.empty(0, 3), torch.tensor([True, False]), float("inf")),
        (),
    ],
)
def test_values_come_back(tmp_path, value):
    back = there_and_back(value, tmp_path / "f")
    assert_identical(back, value)
    plain = trees.map_tensors(value, lambda x: list(x.shape))
    assert trees.map_tensors(back, lambda x: list(x.shape)) == plain
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:, 1:],
        lambda x: x[:1].expand(3, -1),
        lambda x: x.permute(1, 0)[2:],
    ],
)
def test_strides_come_back(tmp_path, view):
    x = view(torch.arange(24.0).view(4, 6))
    back = there_and_back((x,), tmp_path / "f")[0]
    assert back.stride() == x.stride()
    assert torch.equal(back, x)


def test_buffers_are_what_a_tensor_spans():
    x = torch.arange(24.0).view(4, 6)
    packed = trees.pack((x[1:3, 1:3],))
    assert packed.buffers[0].tolist() == x.view(-1)[7:15].tolist()
    packed.buffers[0].zero_()  # a copy
    assert x.sum() == 276


def test_parameters_are_values_and_named_ones_a_dict():
    module = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.ones(2))})
    found = trees.pack((module, torch.nn.ParameterList([torch.ones(1)]))).value()
    assert list(found[0]) == ["weight"]
    assert type(found[1]) is list
    assert not found[0]["weight"].requires_grad


@pytest.mark.parametrize("value", [object(), {1: 2}, torch.nn.Linear(1, 1), torch.float32, b"x"])
def test_refuses_other_values(value):
    name = type(value).__name__
    with pytest.raises(TypeError, match=rf"must be of tensors and plain values, got {name}$"):
        trees.pack((value,))


def test_refuses_what_is_not_strided():
    with pytest.raises(TypeError, match=r"^a tensor must be strided, got torch.sparse_coo$"):
        trees.pack(torch.eye(2).to_sparse())


def tensor(shape, strides, number=0):
    return {"tensor": number, "shape": shape, "strides": strides}


@pytest.mark.parametrize(
    "tree",
    [
        tensor([5], [1]),  # more than there is
        tensor([2], [-1]),
        tensor([2], [1], number=1),
        tensor([2], [1], number=-1),
        tensor(["2"], [1]),
        {"unknown": [{"plain": 1}]},
        {"plain": 1, "more": 2},
        [],
        "text",
        None,
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(tmp_path, tree):
    save_file({"0": torch.ones(4)}, tmp_path / "f", metadata={"tree": json.dumps(tree)})
    with pytest.raises(ValueError, match=r"^f is no file of arguments: "):
        trees.load(tmp_path / "f")


def test_other_files_are_refused(tmp_path):
    nested = "[" * 100_000
    (tmp_path / "text").write_text("no safetensors")
    save_file({"0": torch.ones(1)}, tmp_path / "bare")
    save_file({"a": torch.ones(1)}, tmp_path / "names", metadata={"tree": "{}"})
    save_file({"0": torch.ones(1)}, tmp_path / "deep", metadata={"tree": nested})
    for name in ("text", "bare", "names", "deep", "absent"):
        with pytest.raises(ValueError, match=rf"^{name} is no file of arguments: "):
            trees.load(tmp_path / name)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Trap(), tmp_path / "f")
    with pytest.raises(ValueError, match=r"^f is no file of arguments: "):
        trees.load(tmp_path / "f")
    assert not (tmp_path / "ran").exists()
