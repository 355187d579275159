"""Inputs made of a row's PyTorch code."""

import importlib

import pytest
import torch

from archive.corpus import reference
from fastshard.archive import cases
from fastshard.archive.cases import CONTENTS, ReferenceFailed, arguments_of, other_shapes, read_task
from helpers import assert_identical

LINEAR = """
import torch
import torch.nn as nn
import torch.nn.functional as F

def module_fn(x, index, weight, bias, stride, shape):
    return F.linear(x, weight, bias)

class Model(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        gemm = nn.Linear(in_features, out_features)
        self.weight, self.bias = gemm.weight, nn.Parameter(torch.zeros(out_features))

    def forward(self, x, index, fn=module_fn):
        return fn(x, index, self.weight, self.bias, stride, (in_features,))

batch_size = 8
in_features, out_features = 12, 20
stride = 2
rest = (5,)

def get_inputs():
    return [torch.randn(batch_size, *rest, in_features), torch.arange(6)]

def get_init_inputs():
    return [in_features, out_features]
"""


def made(content: str, dtype=torch.float32, seed=0) -> tuple:
    return arguments_of(read_task(LINEAR), content, seed, dtype)


def test_arguments_are_what_the_function_gets():
    x, index, weight, bias, stride, shape = made("as published")
    assert (x.shape, weight.shape, bias.shape) == ((8, 5, 12), (20, 12), (20,))
    assert (index.tolist(), stride, shape) == (list(range(6)), 2, (12,))
    assert bias.abs().max() == 0


def test_floats_are_of_the_dtype():
    arguments = made("as published", torch.float16)
    assert [a.dtype for a in arguments[:4]] == [
        torch.float16,
        torch.int64,
        torch.float16,
        torch.float16,
    ]


def test_what_is_finite_stays_so_in_float16():
    values = "torch.tensor([1e30, -1e30, float('inf'), 2.0]) * torch.ones("
    large = LINEAR.replace("torch.randn(", values).replace("12, 20", "4, 20")
    x = arguments_of(read_task(large), "as published", 0, torch.float16)[0]
    assert x[0, 0].tolist() == [65504.0, -65504.0, torch.inf, 2.0]


def test_a_function_is_of_a_module_that_can_be_imported():
    """As torch.compile imports it."""
    tasks = [read_task(reference("right")) for _ in range(2)]
    names = [task.function.__globals__["__name__"] for task in tasks]
    assert len(set(names)) == 2
    for name, task in zip(names, tasks, strict=True):
        assert importlib.import_module(name).module_fn is task.function


def test_a_seed_gives_the_same_and_another_others():
    assert_identical(made("scaled"), made("scaled"))
    assert not torch.equal(made("scaled")[0], made("scaled", seed=1)[0])


def test_contents_differ_as_they_say():
    contents = {content: made(content) for content in CONTENTS}
    plain, other = contents["as published"][0], contents["another seed"][0]
    assert not torch.equal(plain, other)
    one = contents["one element changed"]
    assert torch.nonzero(one[0].view(-1) != other.view(-1)).tolist() == [[other.numel() // 2]]
    assert torch.equal(one[2], contents["another seed"][2])
    assert contents["scaled"][0].std() > 20
    assert contents["shifted"][0].mean() > 9
    tails = contents["heavy tails"][0]
    assert (tails - tails.mean()).pow(4).mean() / tails.var().pow(2) > 6  # of a normal one 3


def test_parameters_that_are_zero_get_noise():
    for content in CONTENTS[1:]:
        assert made(content)[3].abs().min() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("get_inputs():", "others():"), "it has no 'get_inputs'"),
        (("class Model", "class Other"), "it has no 'Model'"),
        (("fn=module_fn", "f=module_fn"), "it has no 'fn'"),
        (("import torch\n", "import torch, absent\n"), "ModuleNotFoundError: No module named 'abs"),
        (("return fn(", "return ("), "it does not call its function"),
        (("stride, (in", "stride=stride, shape=(in"), "it calls its function with named arguments"),
        (("return [in_features, out_features]", "return [3]"), "TypeError: .*out_features"),
        (("def get_inputs", "def get_inputs("), "SyntaxError: "),
    ],
)
def test_code_of_another_form_fails(change, said):
    code = LINEAR.replace(*change, 1)
    assert code != LINEAR
    with pytest.raises(ReferenceFailed, match=rf"^{said}"):
        arguments_of(read_task(code), "as published", 0, torch.float32)


def shapes(code: str) -> list[list[int]]:
    arguments = arguments_of(read_task(code), "as published", 0, torch.float32)
    return [list(x.shape) for x in arguments[:2]]


def test_other_shapes_change_one_size_each():
    assert [shapes(code) for code in other_shapes(LINEAR)] == [
        [[9, 5, 12], [6]],
        [[8, 5, 13], [6]],
        [[8, 6, 12], [6]],
        [[8, 5, 12], [7]],
        [[6, 5, 12], [6]],
        [[8, 5, 8], [6]],
        [[8, 4, 12], [6]],
        [[8, 5, 12], [4]],
    ]


def test_sizes_are_also_found_where_they_are_written():
    code = LINEAR.replace("batch_size, *rest, in_features", "4, in_features")
    found = [shapes(each)[0] for each in other_shapes(code)]
    assert found == [[4, 13], [5, 12], [4, 12], [4, 8], [3, 12], [4, 12]]


def test_a_size_that_is_no_size_of_the_inputs_stays():
    stride = [
        arguments_of(read_task(c), "as published", 0, torch.float32)[4]
        for c in other_shapes(LINEAR)
    ]
    assert set(stride) == {2}


def test_code_that_is_no_python_has_no_other_shapes():
    assert list(other_shapes("def (")) == []


def test_the_corpus_has_this_form():
    x, which = arguments_of(read_task(reference("right")), "as published", 0, torch.float32)
    assert (x.shape, which) == ((32, 96), 0)
    assert len(list(other_shapes(reference("right")))) == cases.MAX_SHAPES
