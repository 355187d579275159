"""Our ops in the place of the archive's: the same meaning, or a reason."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastshard.archive import peers
from helpers import assert_as_accurate


def their_rms_norm(x, eps):
    return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + eps)


def their_layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def check(kind, theirs, arguments):
    ours = peers.ours(kind, arguments)
    doubled = [a.double() if torch.is_tensor(a) else a for a in arguments]
    out = ours(*arguments)
    assert out.shape == arguments[0].shape
    assert_as_accurate(out, theirs(*doubled), theirs(*arguments))


def test_rms_norm_over_dimension_1_of_a_matrix():
    check("rmsnorm", their_rms_norm, [torch.randn(8, 64) * 3, 0.5])


@pytest.mark.parametrize("shape", [(64,), (4, 16)])
def test_layer_norm_over_the_dimensions_of_the_weight(shape):
    x, weight, bias = torch.randn(3, 5, *shape), torch.randn(shape), torch.randn(shape)
    check("layernorm", their_layer_norm, [x, weight, bias, 0.5])


def test_their_epsilon_is_optional():
    arguments = [torch.randn(3, 64) / 100, torch.randn(64), torch.randn(64), (64,)]
    expected = F.layer_norm(arguments[0], (64,), *arguments[1:3], 1e-5)
    torch.testing.assert_close(peers.ours("layernorm", arguments)(*arguments), expected)


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (None, [torch.ones(2)], "no op of fastshard computes this alone"),
        ("softmax", [torch.ones(2)], "no op of fastshard computes this alone"),
        (
            "rmsnorm",
            [torch.ones(2, 8, 4, 4), 1e-5],
            "our op does not take these arguments: dimension 1 is not the last",
        ),
        (
            "layernorm",
            [torch.ones(2, 8), torch.ones(8), 1e-5],
            "our op does not take these arguments: the tensors are not x, weight and bias",
        ),
        (
            "rmsnorm",
            [torch.ones(2, 3), 1e-5],
            "our op does not take these arguments: .*16 bytes.*",
        ),
        ("rmsnorm", [3, 1e-5], "our op does not take these arguments: the first is no tensor"),
    ],
)
def test_where_there_is_none_it_says_why(kind, arguments, said):
    found = peers.ours(kind, arguments)
    assert isinstance(found, str)
    assert re.fullmatch(said, found), found
