"""rms_norm: every device against float64, and the registration against opcheck."""

import pytest
import torch
from torch import Tensor

from fastshard import ops
from helpers import assert_as_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 0.1  # large against mean(x^2) = 1: a kernel that drops eps must fail
# Both sides of every config boundary (2, 8, 32 KiB); 7168 is Qwen2.5-7B in 16 bit.
ROW_BYTES = [16, 2048, 2064, 7168, 8192, 8208, 32768]


def golden(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("num_tokens", [1, 7, 257])
def test_matches_float64(num_tokens, row_bytes, dtype, device):
    hidden_size = row_bytes // dtype.itemsize
    x = torch.randn(num_tokens, hidden_size, dtype=dtype, device=device)
    weight = torch.randn(hidden_size, dtype=dtype, device=device)
    actual = ops.rms_norm(x, weight, EPS)
    naive = torch.nn.functional.rms_norm(x, (hidden_size,), weight, EPS)
    assert_as_accurate(actual, golden(x, weight, EPS), naive)


@pytest.mark.parametrize("shape", [(0, 64), (2, 3, 64)], ids=str)
def test_leading_dims(shape, device):
    x, weight = torch.randn(shape, device=device), torch.randn(64, device=device)
    flat = ops.rms_norm(x.view(-1, 64), weight, EPS)
    assert torch.equal(ops.rms_norm(x, weight, EPS), flat.view(shape))


def test_strided_rows(device):
    padded = torch.full((5, 192), float("nan"), device=device)  # a read past the row shows as NaN
    padded[:, :64] = torch.randn(5, 64)
    x, weight = padded[:, :64], torch.randn(64, device=device)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight))


@pytest.mark.parametrize("dims", [(1, 0, 2), (2, 1, 0), (0, 2, 1)], ids=str)
def test_permuted_input(dims, device):
    x = torch.randn(16, 24, 32, device=device).permute(dims)
    weight = torch.randn(x.shape[-1], device=device)
    out = ops.rms_norm(x, weight)
    assert out.is_contiguous()
    # 1e-6: eager PyTorch may sum a permuted row of 16-32 float32 values in another order.
    torch.testing.assert_close(out, ops.rms_norm(x.contiguous(), weight), rtol=1e-6, atol=1e-6)


def test_unaligned_input(device):
    flat = torch.randn(4 * 64 + 1, device=device)
    x, weight = flat[1:].view(4, 64), torch.randn(64, device=device)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.clone(), weight))


def test_rejects_wrong_arguments(device):
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \[64\], got \[65\]"):
        ops.rms_norm(x, torch.ones(65, device=device))
    with pytest.raises(TypeError, match=r"weight must be torch.float32, got torch.float16"):
        ops.rms_norm(x, weight.half())
    with pytest.raises(ValueError, match=r"multiple of 16 bytes, got shape \[2, 63\]"):
        ops.rms_norm(x[:, :63], weight[:63])
    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch.int32"):
        ops.rms_norm(x.int(), weight)


def test_traces_without_a_graph_break(device):
    x, weight = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    compiled = torch.compile(
        lambda x: ops.rms_norm(x * 2, weight), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), ops.rms_norm(x * 2, weight))


def test_opcheck(device):
    args = (torch.randn(3, 64, device=device), torch.randn(64, device=device), EPS, False)
    torch.library.opcheck(torch.ops.fastshard.rms_norm.default, args)
