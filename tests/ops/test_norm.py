"""Norms: every device against float64, the rounding of the sums, and the registration.

``RMS`` and ``LAYER`` describe the two norms, so that one body tests both and both their add forms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastshard import ops
from helpers import (
    CUDA_ONLY,
    KERNELS_ONLY,
    assert_as_accurate,
    assert_compiles_once,
    assert_gradients_as_accurate,
    assert_ignores_autocast,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 0.1  # large against mean(x^2) = 1: a kernel that drops eps must fail
# Both sides of every config boundary (256, 512 B, 2 to 32 KiB); 7168 is Qwen2.5-7B in 16 bit.
ROW_BYTES = [16, 256, 272, 512, 528, 2048, 2064, 4096, 4112, 7168, 8192, 8208]
LARGE_ROW_BYTES = [16384, 16400, 32768, 32784, 65536]


def rms_golden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def layer_golden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.double()
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight.double() + bias.double()


@dataclass(frozen=True)
class Norm:
    """One norm; each function takes x, weight, bias, and ``add`` residual as its second."""

    golden: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    add: Callable[..., tuple[Tensor, Tensor]]


RMS = Norm(
    rms_golden,
    lambda x, w, b: F.rms_norm(x, w.shape, w, EPS),
    lambda x, w, b: ops.rms_norm(x, w, EPS),
    lambda x, r, w, b: ops.add_rms_norm(x, r, w, EPS),
)
RMS_IN_FP32 = Norm(
    rms_golden,
    lambda x, w, b: F.rms_norm(x, w.shape, w, EPS),
    lambda x, w, b: ops.rms_norm(x, w, EPS, weight_in_fp32=True),
    lambda x, r, w, b: ops.add_rms_norm(x, r, w, EPS, weight_in_fp32=True),
)
LAYER = Norm(
    layer_golden,
    lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
    lambda x, w, b: ops.layer_norm(x, w, b, EPS),
    lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, EPS),
)
NORMS = [
    pytest.param(RMS, id="rms"),
    pytest.param(RMS_IN_FP32, id="rms_in_fp32"),
    pytest.param(LAYER, id="layer"),
]
SIZES = [
    *((row_bytes, num_tokens) for row_bytes in ROW_BYTES for num_tokens in (1, 7)),
    (512, 257),
    (4112, 1024),  # as many rows as make a layer norm take fewer threads a row
    *(pytest.param(8192, num_tokens, marks=pytest.mark.large) for num_tokens in (257, 1024)),
    *(pytest.param(row_bytes, 2, marks=pytest.mark.large) for row_bytes in LARGE_ROW_BYTES),
]


def tensors(shape, dtype, device, count=1):
    """``count`` tensors of ``shape``, then weight and bias, all random and unlike each other."""
    vectors = [(shape[-1],)] * 2
    return [torch.randn(s, dtype=dtype, device=device) for s in [shape] * count + vectors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row_bytes", "num_tokens"), SIZES)
@pytest.mark.parametrize("norm", NORMS)
def test_matches_float64(norm, row_bytes, num_tokens, dtype, device):
    # Several calls for few rows: how far eager errs on a single row of float32 is a matter of luck.
    num_calls = 1 if num_tokens > 1 else 16
    shape = (num_calls * num_tokens, row_bytes // dtype.itemsize)
    x, weight, bias = tensors(shape, dtype, device)
    x += 3  # a layer norm that takes the variance about zero must fail
    actual = torch.cat([norm.plain(rows, weight, bias) for rows in x.split(num_tokens)])
    assert_as_accurate(actual, norm.golden(x, weight, bias), norm.naive(x, weight, bias))


VARIANTS = ["16x1", "32x1", "64x2", "128x2", "256x2", "128x4", "512x1", "256x4", "512x4"]
VARIANTS += ["1024x2", "1024x4"]


@KERNELS_ONLY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_variant_that_holds_a_row(variant, dtype, device):
    threads, vecs = map(int, variant.split("x"))
    longest = 16 * threads * vecs // dtype.itemsize
    for hidden_size in (longest, 64 // dtype.itemsize):
        x, residual, weight, bias = tensors((5, hidden_size), dtype, device, count=2)
        actual = torch.ops.fastshard.rms_norm.default(x, weight, EPS, False, variant)
        assert_as_accurate(actual, RMS.golden(x, weight, bias), RMS.naive(x, weight, bias))
        actual, new_residual = torch.ops.fastshard.add_layer_norm.default(
            x, residual, weight, bias, EPS, variant
        )
        assert torch.equal(new_residual, x + residual)
        golden, naive = (f(new_residual, weight, bias) for f in (LAYER.golden, LAYER.naive))
        assert_as_accurate(actual, golden, naive)
    x, weight, _ = tensors((2, longest + 16 // dtype.itemsize), dtype, device)
    with pytest.raises(RuntimeError, match=f"no variant {variant} holds rows|rows must be at most"):
        torch.ops.fastshard.rms_norm.default(x, weight, EPS, False, variant)


@KERNELS_ONLY
@pytest.mark.parametrize("variant", ["", "fast", "256", "256x", "256x2x", "0x2", "256x-2", "256x3"])
def test_rejects_an_unknown_variant(variant, device):
    x, weight, _ = tensors((2, 64), torch.float16, device)
    with pytest.raises(RuntimeError, match=r"variant must be auto, or|no variant 256x3"):
        torch.ops.fastshard.rms_norm.default(x, weight, EPS, False, variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row_bytes", "num_tokens"), SIZES)
@pytest.mark.parametrize("norm", NORMS)
def test_add_is_the_norm_of_the_rounded_sum(norm, row_bytes, num_tokens, dtype, device):
    shape = (num_tokens, row_bytes // dtype.itemsize)
    x, residual, weight, bias = tensors(shape, dtype, device, count=2)
    copies = x.clone(), residual.clone()
    normed, new_residual = norm.add(x, residual, weight, bias)
    assert torch.equal(new_residual, x + residual)  # one rounding: the same in any order
    assert torch.equal(normed, norm.plain(new_residual, weight, bias))
    assert torch.equal(x, copies[0])
    assert torch.equal(residual, copies[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (2, 3, 4, 64)], ids=str)
def test_leading_dims(shape, norm, device):
    x, residual, weight, bias = tensors(shape, torch.float32, device, count=2)
    flat = norm.plain(x.reshape(-1, 64), weight, bias)
    assert torch.equal(norm.plain(x, weight, bias), flat.reshape(shape))
    outputs = norm.add(x, residual, weight, bias)
    flat_outputs = norm.add(x.reshape(-1, 64), residual.reshape(-1, 64), weight, bias)
    for output, flat_output in zip(outputs, flat_outputs, strict=True):
        assert torch.equal(output, flat_output.reshape(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_heads_of_a_packed_projection(norm, dtype, device):
    # As Qwen3 norms q and k: rows of head_dim whose batch, token and head strides do not collapse.
    packed = torch.full((2, 3, 10 * 128), torch.nan, dtype=dtype, device=device)
    packed[:, :, 128 : 7 * 128].normal_()
    x = packed[:, :, 128 : 5 * 128].view(2, 3, 4, 128)
    residual = packed[:, :, 5 * 128 : 7 * 128].view(2, 3, 2, 128).repeat(1, 1, 2, 1)
    weight, bias = (torch.randn(128, dtype=dtype, device=device) for _ in range(2))
    expected = norm.plain(x.contiguous(), weight, bias)
    assert torch.equal(norm.plain(x, weight, bias), expected)
    assert torch.equal(norm.plain(x[1:, ::2], weight, bias), expected[1:, ::2])
    expected = norm.add(x.contiguous(), residual, weight, bias)
    for actual, output in zip(norm.add(residual, x, weight, bias), expected, strict=True):
        assert torch.equal(actual, output)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [(1, 0, 2), (2, 1, 0), (0, 2, 1)], ids=str)
def test_permuted_input(dims, norm, device):
    x = torch.randn(16, 24, 32, device=device).permute(dims)
    weight, bias = (torch.randn(x.shape[-1], device=device) for _ in range(2))
    # 2e-6: eager PyTorch may sum a permuted row of 16-32 float32 values in another order.
    expected = norm.plain(x.contiguous(), weight, bias)
    outputs = (norm.plain(x, weight, bias), norm.add(x, torch.zeros_like(x), weight, bias)[0])
    for out in outputs:
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_unaligned_tensors(norm, device):
    flat = torch.randn(3, 4 * 64 + 1, device=device)
    x, residual = flat[0, 1:].view(4, 64), flat[1, 1:].view(4, 64)
    weight, bias = flat[2, 1:65], flat[2, 65:129]
    assert torch.equal(norm.plain(x, weight, bias), norm.plain(x.clone(), weight, bias))
    outputs = norm.add(x, residual, weight, bias)
    expected = norm.add(x.clone(), residual.clone(), weight.clone(), bias.clone())
    for output, aligned in zip(outputs, expected, strict=True):
        assert torch.equal(output, aligned)


def test_weight_convention_decides_where_to_round(device):
    x = torch.randn(64, 256, dtype=torch.bfloat16, device=device)
    weight = torch.randn(256, device=device).bfloat16()
    x_hat = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    early = (x_hat.bfloat16().double() * weight.double()).bfloat16()
    late = (x_hat * weight.double()).bfloat16()
    assert (early != late).float().mean() > 0.1
    # Not exactly: a value next to a rounding boundary may fall either way in float32.
    assert (ops.rms_norm(x, weight, EPS) != early).float().mean() < 0.01
    assert (ops.rms_norm(x, weight, EPS, weight_in_fp32=True) != late).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_a_large_mean(dtype, device):
    # mean^2 / variance = 4e6 in float32: E[x^2] - E[x]^2 would lose every digit of the variance.
    mean = {torch.float32: 2000, torch.float16: 200, torch.bfloat16: 30}[dtype]
    x = (torch.randn(5, 512, device=device) + mean).to(dtype)
    weight, bias = (torch.randn(512, dtype=dtype, device=device) for _ in range(2))
    golden = layer_golden(x, weight, bias)
    assert_as_accurate(
        ops.layer_norm(x, weight, bias, EPS), golden, F.layer_norm(x, (512,), weight, bias, EPS)
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
def test_layer_norm_without_weight_or_bias(has_weight, has_bias, device):
    x, residual, weight, bias = tensors((3, 64), torch.float32, device, count=2)
    expected = (
        weight if has_weight else torch.ones(64, device=device),
        bias if has_bias else torch.zeros(64, device=device),
    )
    given = weight if has_weight else None, bias if has_bias else None
    assert torch.equal(ops.layer_norm(x, *given), ops.layer_norm(x, *expected))
    outputs = ops.add_layer_norm(x, residual, *given)
    for output, full in zip(outputs, ops.add_layer_norm(x, residual, *expected), strict=True):
        assert torch.equal(output, full)


@pytest.mark.parametrize("norm", NORMS)
def test_rejects_wrong_x_and_weight(norm, device):
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    for call in (
        lambda x, w: norm.plain(x, w, None if norm is LAYER else weight),
        lambda x, w: norm.add(x, x, w, None if norm is LAYER else weight),
    ):
        with pytest.raises(ValueError, match=r"weight must have shape \[64\], got \[65\]"):
            call(x, torch.ones(65, device=device))
        with pytest.raises(ValueError, match=r"weight must have shape \[64\], got \[1, 64\]"):
            call(x, weight[None])
        with pytest.raises(TypeError, match=r"weight must be torch.float32, got torch.float16"):
            call(x, weight.half())
        with pytest.raises(ValueError, match=r"weight must be on \w+(:0)?, got meta"):
            call(x, weight.to("meta"))
        with pytest.raises(ValueError, match=r"multiple of 16 bytes, got shape \[2, 63\]"):
            call(x[:, :63], weight[:63])
        with pytest.raises(ValueError, match=r"multiple of 16 bytes, got shape \[2, 0\]"):
            call(x[:, :0], weight[:0])
        with pytest.raises(ValueError, match=r"multiple of 16 bytes, got shape \[\]"):
            call(x[0, 0], weight)
        with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch"):
            call(x.int(), weight)
        row = torch.ones(16388, device=device)
        with pytest.raises(ValueError, match=r"at most 65536 bytes, got 16388 elements of 4 bytes"):
            call(row[None], row)


@pytest.mark.parametrize("norm", [RMS, LAYER], ids=["rms", "layer"])
def test_rejects_wrong_residual(norm, device):
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 64\], got \[64\]"):
        norm.add(x, x[0], weight, weight)
    with pytest.raises(TypeError, match=r"residual must be torch.float32, got torch.bfloat16"):
        norm.add(x, x.bfloat16(), weight, weight)
    with pytest.raises(ValueError, match=r"residual must be on \w+(:0)?, got meta"):
        norm.add(x, x.to("meta"), weight, weight)


def test_rejects_wrong_bias(device):
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    for call in (ops.layer_norm, lambda x, w, b: ops.add_layer_norm(x, x, w, b)):
        with pytest.raises(ValueError, match=r"bias must have shape \[64\], got \[32\]"):
            call(x, weight, weight[:32])
        with pytest.raises(TypeError, match=r"bias must be torch.float32, got torch.float16"):
            call(x, weight, weight.half())
        with pytest.raises(ValueError, match=r"bias must be on \w+(:0)?, got meta"):
            call(x, weight, weight.to("meta"))


@KERNELS_ONLY
def test_raw_ops_guard_memory(device):
    x, residual, weight, bias = tensors((2, 64), torch.float32, device, count=2)
    raw = torch.ops.fastshard
    for call, message in (
        (
            lambda: raw.rms_norm(x, weight[:60], EPS, False),
            r"must be \[64\], got 1 dimensions and 60",
        ),
        (lambda: raw.rms_norm(x, weight.half(), EPS, False), "must have the device and dtype of"),
        (lambda: raw.rms_norm(x[:, :63], weight[:63], EPS, False), "rows of whole 16-byte vectors"),
        (lambda: raw.rms_norm(x[0, 0], weight, EPS, False), "x must have at least 1 dimension"),
        (lambda: raw.rms_norm(x.int(), weight.int(), EPS, False), "x must be float32, .* got Int"),
        (
            lambda: raw.add_rms_norm(x, residual[:1], weight, EPS, False),
            "residual must have the sh",
        ),
        (
            lambda: raw.layer_norm(x, None, bias[:60], EPS),
            r"must be \[64\], got 1 dimensions and 60",
        ),
        (
            lambda: raw.add_layer_norm(x, residual.half(), None, None, EPS),
            "must have the device and",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def rms_norms(x, residual, weight, bias):
    """Every op of RMSNorm; the sum of two uses is in the gradients."""
    normed = ops.rms_norm(x, weight, EPS, weight_in_fp32=True)
    return normed, *ops.add_rms_norm(x, residual, weight, EPS)


def layer_norms(x, residual, weight, bias):
    normed = ops.layer_norm(x, weight, bias, EPS)
    return normed, *ops.add_layer_norm(x, residual, weight, bias, EPS)


def plain_layer_norms(x, residual, weight, bias):
    vectors = (weight, bias, EPS)
    total = x + residual
    return (
        F.layer_norm(x, x.shape[-1:], *vectors),
        F.layer_norm(total, x.shape[-1:], *vectors),
        total,
    )


def plain_rms_norms(x, residual, weight, bias):
    total = x + residual
    return *(F.rms_norm(t, t.shape[-1:], weight, EPS) for t in (x, total)), total


def named(shape, dtype, device) -> dict[str, Tensor]:
    names = ("x", "residual", "weight", "bias")
    return dict(zip(names, tensors(shape, dtype, device, count=2), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 24)], ids=str)
@pytest.mark.parametrize(
    ("norms", "plain", "needed"),
    [
        (rms_norms, plain_rms_norms, ("x", "residual", "weight")),
        (layer_norms, plain_layer_norms, ("x", "residual", "weight", "bias")),
        (layer_norms, plain_layer_norms, ("x", "bias")),
        (layer_norms, plain_layer_norms, ("residual", "weight")),
    ],
)
def test_gradients(norms, plain, needed, shape, dtype, device):
    arguments = named(shape, dtype, device)
    arguments["x"] += 1  # a layer norm that takes the variance about zero must fail
    assert_gradients_as_accurate(norms, plain, arguments, needed)


@pytest.mark.parametrize(
    ("norms", "plain", "needed"),
    [
        (rms_norms, plain_rms_norms, ("x", "residual", "weight")),
        (layer_norms, plain_layer_norms, ("x", "residual", "weight", "bias")),
    ],
)
def test_gradients_of_a_compiled_function(norms, plain, needed, device):
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    arguments = named((5, 32), torch.float32, device)
    assert_gradients_as_accurate(compiled, plain, arguments, needed)


def test_gradients_without_vectors(device):
    given = {name: t for name, t in named((5, 32), torch.float32, device).items() if t.dim() == 2}

    def norms(x, residual):
        return ops.layer_norm(x, eps=EPS), *ops.add_layer_norm(x, residual, eps=EPS)

    def plain(x, residual):
        return plain_layer_norms(x, residual, None, None)

    assert_gradients_as_accurate(norms, plain, given)


@pytest.mark.parametrize("op_name", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
def test_second_derivatives(op_name, device):
    x, residual, weight, _ = tensors((2, 16), torch.float32, device, count=2)
    function = getattr(ops, op_name)

    def total(x):
        arguments = (x, residual, weight) if op_name.startswith("add") else (x, weight)
        normed = function(*arguments, eps=EPS)
        return (normed if isinstance(normed, Tensor) else normed[0]).pow(3).sum()

    def plain(x):
        x = x + residual if op_name.startswith("add") else x
        norm = F.rms_norm if "rms" in op_name else F.layer_norm
        return norm(x, weight.shape, weight.to(x), eps=EPS).pow(3).sum()

    hessian = torch.autograd.functional.hessian
    golden, naive = hessian(plain, x.double()), hessian(plain, x)
    assert_as_accurate(hessian(total, x), golden, naive)


@pytest.mark.parametrize("norms", [rms_norms, layer_norms])
def test_compiles_once_for_all_sizes(norms, device):
    sizes = [(5, 64), (3, 64), (17, 128)]
    assert_compiles_once(norms, (named(shape, torch.float16, device) for shape in sizes))


@pytest.mark.parametrize("norms", [rms_norms, layer_norms])
def test_ignores_autocast(norms, device):
    assert_ignores_autocast(norms, named((3, 64), torch.float32, device))


@pytest.mark.parametrize("norm", NORMS)
def test_traces_without_a_graph_break(norm, device):
    x, residual, weight, bias = tensors((3, 64), torch.float32, device, count=2)

    def both(x, residual):
        normed, new_residual = norm.add(x * 2, residual, weight, bias)
        return norm.plain(normed, weight, bias), new_residual

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), both(x, residual))


OPCHECK_ARGUMENTS = {
    "rms_norm": lambda x, r, w, b: (x, w, EPS, False),
    "add_rms_norm": lambda x, r, w, b: (x, r, w, EPS, True),
    "layer_norm": lambda x, r, w, b: (x, w, b, EPS),
    "add_layer_norm": lambda x, r, w, b: (x, r, None, b, EPS),
}


@pytest.mark.parametrize("op_name", OPCHECK_ARGUMENTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(op_name, transposed, device):
    x, residual, weight, bias = tensors((4, 3, 64), torch.float32, device, count=2)
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    op = getattr(torch.ops.fastshard, op_name).default
    torch.library.opcheck(op, OPCHECK_ARGUMENTS[op_name](x, residual, weight, bias))


@CUDA_ONLY
@pytest.mark.parametrize("norm", NORMS)
def test_replays_in_a_graph(norm, device):
    x, residual, weight, bias = tensors((5, 512), torch.float16, device, count=2)
    assert_replays_in_a_graph(lambda: norm.plain(x, weight, bias), x)
    assert_replays_in_a_graph(lambda: torch.cat(norm.add(x, residual, weight, bias)), x)


@CUDA_ONLY
@pytest.mark.parametrize("norm", NORMS)
def test_runs_one_kernel_of_ours(norm, device):
    x, residual, weight, bias = tensors((5, 512), torch.float16, device, count=2)
    heads = torch.randn(2, 3, 10, 128, dtype=torch.float16, device=device)[:, :, 2:6]
    kernel = "fastshard::layer_norm_kernel" if norm is LAYER else "fastshard::rms_norm_kernel"
    for call in (
        lambda: norm.plain(x, weight, bias),
        lambda: norm.add(x, residual, weight, bias),
        lambda: norm.plain(heads, weight[:128], bias[:128]),  # in place, without a copy
    ):
        names = cuda_kernel_names(call)
        assert len(names) == 1
        assert kernel in names[0]


def test_cost():
    x, residual, weight, bias = tensors((3, 64), torch.float16, "cpu", count=2)
    assert ops.COSTS["rms_norm"](x, weight, EPS, False).bytes == 2 * (2 * 192 + 64)
    assert ops.COSTS["add_rms_norm"](x, residual, weight, EPS, False).bytes == 2 * (4 * 192 + 64)
    assert ops.COSTS["layer_norm"](x, weight, bias, EPS).bytes == 2 * (2 * 192 + 128)
    assert ops.COSTS["add_layer_norm"](x, residual, None, bias, EPS).bytes == 2 * (4 * 192 + 64)
