"""linear: every device against float64, and the registration against opcheck."""

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
    assert_ignores_autocast,
    assert_refuses_gradients,
    assert_replays_in_a_graph,
    cuda_kernel_names,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_DTYPES = [torch.float16, torch.bfloat16]
EPS = 0.1  # large against mean(x^2) = 1: a kernel that drops eps must fail
NAN = float("nan")


def golden(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    weight_in_fp32: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum in float64, of a norm that is rounded where the specification rounds it."""
    if norm_weight is not None:
        x64 = x.double()
        x_hat = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt()
        if not weight_in_fp32:
            x_hat = x_hat.to(x.dtype).double()
        x = (x_hat * norm_weight.double()).to(x.dtype)
    out = x.double() @ weight.double().T
    out = out if bias is None else out + bias.double()
    return out if residual is None else out + residual.double()


def naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    weight_in_fp32: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    if norm_weight is not None:
        x32 = x.float()
        x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)
        if weight_in_fp32:
            x = (x_hat * norm_weight.float()).to(x.dtype)
        else:
            x = x_hat.to(x.dtype) * norm_weight
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def make(
    num_tokens, out_features, in_features, dtype, device, options=("bias", "norm", "residual")
):
    """Random arguments of golden and naive; options among bias, norm, norm32 and residual."""

    def rand(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    return {
        "x": rand(num_tokens, in_features),
        "weight": rand(out_features, in_features) / in_features**0.5,
        "bias": rand(out_features) if "bias" in options else None,
        "norm_weight": rand(in_features) if {"norm", "norm32"} & set(options) else None,
        "weight_in_fp32": "norm32" in options,
        "residual": rand(num_tokens, out_features) if "residual" in options else None,
    }


def check(arguments: dict) -> None:
    actual = ops.linear(norm_eps=EPS, **arguments)
    assert actual.is_contiguous()
    assert_as_accurate(actual, golden(**arguments), naive(**arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_rows(num_tokens, dtype, device):
    check(make(num_tokens, 72, 264, dtype, device))


# A warp takes 128 of K at a time and the block 1024, a chunk; registers hold four of them.
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 16])
@pytest.mark.parametrize(
    "in_features", [8, 24, 32, 40, 64, 72, 128, 136, 512, 520, 1024, 1032, 2048, 2056, 3080, 4096]
)
def test_in_features(in_features, num_tokens, dtype, device):
    check(make(num_tokens, 24, in_features, dtype, device))


@pytest.mark.parametrize("num_tokens", [3, 12])
@pytest.mark.parametrize("options", ["bias", "norm", "norm32"])
@pytest.mark.parametrize("in_features", [4104, 8192, 9224])
def test_in_features_beyond_the_registers(in_features, options, num_tokens, device):
    check(make(num_tokens, 24, in_features, torch.bfloat16, device, (options, "residual")))


# A tile is 8 rows of weight. The emulator holds 4 blocks, which sum up 8 tiles together, with more
# than 8 rows of x 4: 32, 256 and 128 rows of weight.
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize(
    "out_features", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 128, 129, 256, 257, 265, 545]
)
def test_out_features(out_features, num_tokens, dtype, device):
    check(make(num_tokens, out_features, 72, dtype, device))


# Several groups of tiles a block, and x in several parts for each of them.
@pytest.mark.parametrize("num_tokens", [7, 16])
def test_many_tiles_and_parts(num_tokens, device):
    check(make(num_tokens, 545, 4104, torch.float16, device))


@CUDA_ONLY
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [
        (4864, 896),
        (896, 4864),
        (4096, 11008),
        (3584, 18944),
        (64, 32768),
        (151936, 896),
        (32003, 1024),
    ],
)
def test_model_sizes(out_features, in_features, dtype, device):
    check(make(3, out_features, in_features, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("residual", ["", "residual"])
@pytest.mark.parametrize("bias", ["", "bias"])
@pytest.mark.parametrize("norm", ["", "norm", "norm32"])
def test_options(norm, bias, residual, num_tokens, dtype, device):
    check(make(num_tokens, 40, 96, dtype, device, (norm, bias, residual)))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_sums_are_rounded_once(dtype, device):
    # bias cancels residual, so that what is left shows where each sum was rounded
    x = torch.full((1, 8), 1 / 8, dtype=dtype, device=device)
    weight = torch.full((5, 8), 2.0**-10, dtype=dtype, device=device)
    bias = torch.full((5,), 256.0, dtype=dtype, device=device)
    actual = ops.linear(x, weight, bias, residual=-bias[None])
    assert torch.equal(actual, torch.full_like(actual, 2.0**-10))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("weight_in_fp32", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 17])
def test_norm_is_rms_norm(num_tokens, weight_in_fp32, dtype, device):
    # The squares of these values add up exactly in any order, and the weight picks one value a row:
    # a norm that is rounded elsewhere shows in the last bit.
    values = torch.tensor([-2, -1, -0.5, 0.5, 1, 2], dtype=dtype, device=device)
    x = values[torch.randint(6, (num_tokens, 64), device=device)]
    norm_weight = torch.randn(64, dtype=dtype, device=device)
    norm = {"norm_weight": norm_weight, "norm_eps": EPS, "weight_in_fp32": weight_in_fp32}
    actual = ops.linear(x, torch.eye(64, dtype=dtype, device=device), **norm)
    assert torch.equal(actual, ops.rms_norm(x, norm_weight, EPS, weight_in_fp32=weight_in_fp32))


@pytest.mark.parametrize("shape", [(0, 72), (2, 3, 72), (72,), (2, 0, 72), (3, 7, 72)], ids=str)
def test_leading_dims(shape, device):
    a = make(1, 24, 72, torch.float16, device)
    x = torch.randn(shape, dtype=torch.float16, device=device)
    residual = torch.randn(*shape[:-1], 24, dtype=torch.float16, device=device)
    actual = ops.linear(x, a["weight"], a["bias"], residual=residual)
    flat = ops.linear(x.view(-1, 72), a["weight"], a["bias"], residual=residual.view(-1, 24))
    assert actual.shape == residual.shape
    assert_same(actual, flat.view(residual.shape))


def test_no_out_features(device):
    weight = torch.empty(0, 64, dtype=torch.float16, device=device)
    x = torch.randn(3, 64, dtype=torch.float16, device=device)
    assert ops.linear(x, weight).shape == (3, 0)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal float16 values, but for where torch's matmul served one of them.

    It may sum in another order, and rounds before the bias and the residual are added: half an ulp
    of up to 16, which is 2^-7, for each.
    """
    torch.testing.assert_close(actual, expected, rtol=2**-10, atol=2**-6)


@pytest.mark.parametrize("num_tokens", [5, 20])
def test_memory_around_the_arguments_is_not_read(num_tokens, device):
    a = make(num_tokens, 21, 72, torch.float16, device)
    strided = dict(a)
    for name in ("x", "weight", "residual"):
        rows, columns = a[name].shape
        padded = torch.full((rows + 2, columns + 24), NAN, dtype=torch.float16, device=device)
        strided[name] = padded[1:-1, 8 : 8 + columns]
        strided[name].copy_(a[name])
    for name in ("bias", "norm_weight"):
        padded = torch.full((a[name].shape[0] + 16,), NAN, dtype=torch.float16, device=device)
        strided[name] = padded[8:-8]
        strided[name].copy_(a[name])
    assert_same(ops.linear(norm_eps=EPS, **strided), ops.linear(norm_eps=EPS, **a))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "norm_weight", "residual"])
@pytest.mark.parametrize("num_tokens", [5, 20])
def test_unaligned_arguments(num_tokens, name, device):
    a = make(num_tokens, 21, 72, torch.float16, device)
    shifted = torch.full((a[name].numel() + 1,), NAN, dtype=torch.float16, device=device)[1:]
    shifted = shifted.view(a[name].shape).copy_(a[name])
    actual = ops.linear(norm_eps=EPS, **{**a, name: shifted})
    assert_same(actual, ops.linear(norm_eps=EPS, **a))


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
@pytest.mark.parametrize("num_tokens", [5, 20])
def test_transposed_arguments(num_tokens, name, device):
    a = make(num_tokens, 21, 72, torch.float16, device)
    transposed = {**a, name: a[name].T.contiguous().T}
    assert_same(ops.linear(norm_eps=EPS, **transposed), ops.linear(norm_eps=EPS, **a))


@pytest.mark.parametrize("shape", [(2, 3), (3, 7)], ids=str)
def test_permuted_leading_dims(shape, device):
    a = make(1, 24, 72, torch.float16, device)
    x = torch.randn(*shape, 72, dtype=torch.float16, device=device).transpose(0, 1)
    residual = torch.randn(*shape, 24, dtype=torch.float16, device=device).transpose(0, 1)

    def call(x, residual):
        return ops.linear(x, a["weight"], a["bias"], residual=residual)

    actual = call(x, residual)
    assert actual.is_contiguous()
    assert_same(actual, call(x.contiguous(), residual.contiguous()))


@pytest.mark.parametrize("name", ["bias", "norm_weight"])
def test_strided_vectors(name, device):
    a = make(5, 24, 72, torch.float16, device)
    strided = a[name][:, None].expand(-1, 2).contiguous()[:, 0]
    assert_same(ops.linear(norm_eps=EPS, **{**a, name: strided}), ops.linear(norm_eps=EPS, **a))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [1, 7, 12])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_in_features_of_no_whole_vector(num_tokens, in_features, dtype, device):
    check(make(num_tokens, 5, in_features, dtype, device, ("bias", "residual")))


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_weight_rows_that_end_within_a_vector(num_tokens, device):
    a = make(num_tokens, 5, 12, torch.float16, device, ("bias", "residual"))
    padded = torch.full((5, 16), NAN, dtype=torch.float16, device=device)
    padded[:, :12] = a["weight"]
    check({**a, "weight": padded[:, :12]})


def test_rejects_wrong_arguments(device):
    a = make(2, 24, 64, torch.float16, device)
    a["norm_eps"] = EPS

    def call(**changed):
        return ops.linear(**{**a, **changed})

    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch.int32"):
        call(x=a["x"].int())
    with pytest.raises(ValueError, match=r"x must have rows of at least 1 element, got shape \[\]"):
        call(x=a["x"][0, 0])
    with pytest.raises(ValueError, match=r"at least 1 element, got shape \[2, 0\]"):
        call(x=a["x"][:, :0])
    with pytest.raises(ValueError, match=r"multiple of 16 bytes for a norm, got shape \[2, 63\]"):
        call(x=a["x"][:, :63], weight=a["weight"][:, :63], norm_weight=a["norm_weight"][:63])
    with pytest.raises(
        ValueError, match=r"weight must have shape \[out_features, 64\], got \[64, 24\]"
    ):
        call(weight=a["weight"].T)
    with pytest.raises(ValueError, match=r"\[out_features, 64\], got \[64\]"):
        call(weight=a["weight"][0])
    with pytest.raises(ValueError, match=r"bias must have shape \[24\], got \[23\]"):
        call(bias=a["bias"][:23])
    with pytest.raises(ValueError, match=r"norm_weight must have shape \[64\], got \[1, 64\]"):
        call(norm_weight=a["norm_weight"][None])
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 24\], got \[1, 24\]"):
        call(residual=a["residual"][:1])
    for name in ("weight", "bias", "norm_weight", "residual"):
        with pytest.raises(TypeError, match=rf"{name} must be torch.float16, got torch.bfloat16"):
            call(**{name: a[name].bfloat16()})
        with pytest.raises(ValueError, match=rf"{name} must be on {device.type}(:0)?, got meta"):
            call(**{name: a[name].to("meta")})


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (
            "weight",
            (slice(None), slice(63)),
            r"weight must have two dimensions, the second that of x's rows",
        ),
        ("bias", slice(23), r"bias must be \[24\]"),
        ("norm_weight", slice(63), r"norm_weight must be \[64\]"),
        ("residual", slice(1), r"residual must have the shape of the output"),
    ],
)
def test_raw_op_guards_memory(name, part, message, device):
    a = make(2, 24, 64, torch.float16, device)
    a[name] = a[name][part]
    args = (a["x"], a["weight"], a["bias"], a["norm_weight"], EPS, False, a["residual"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastshard.linear.default(*args)


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_traces_without_a_graph_break(num_tokens, device):
    a = make(num_tokens, 24, 64, torch.float16, device)

    def function(x):
        return ops.linear(x * 2, a["weight"], a["bias"], norm_weight=a["norm_weight"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a["x"]), function(a["x"]))


def test_compiles_once_for_all_sizes(device):
    sizes = [(3, 24, 64), (17, 24, 64), (5, 40, 128)]
    assert_compiles_once(ops.linear, (make(*size, torch.float16, device) for size in sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 17])
def test_ignores_autocast(num_tokens, dtype, device):
    assert_ignores_autocast(ops.linear, make(num_tokens, 24, 64, dtype, device))


def test_vmap_gives_what_a_loop_gives(device):
    a = make(12, 24, 64, torch.float16, device)
    x, residual = (a[name].unflatten(0, (4, 3)) for name in ("x", "residual"))

    def function(x, residual):
        return ops.linear(**a | {"x": x, "residual": residual})

    with torch.no_grad():
        actual = torch.vmap(function)(x, residual)
    expected = [function(*rows) for rows in zip(x, residual, strict=True)]
    assert torch.equal(actual, torch.stack(expected))


def test_refuses_gradients(device):
    assert_refuses_gradients(ops.linear, make(3, 24, 64, torch.float16, device))


@pytest.mark.parametrize("options", [(), ("bias", "norm", "residual")], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 17])
def test_opcheck(num_tokens, options, device):
    a = make(num_tokens, 24, 64, torch.float16, device, options)
    args = (a["x"], a["weight"], a["bias"], a["norm_weight"], EPS, False, a["residual"])
    torch.library.opcheck(torch.ops.fastshard.linear.default, args)


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("variant", "num_tokens", "message"),
    [
        ("fast", 3, "variant must be auto, library or stream, got fast"),
        ("stream", 17, "variant stream takes at most 16 rows and a contiguous weight, got 17 rows"),
    ],
)
def test_rejects_variants(variant, num_tokens, message, device):
    a = make(num_tokens, 24, 64, torch.float16, device)
    with pytest.raises(RuntimeError, match=message):
        raw_linear(a, variant)


def raw_linear(a, variant):
    args = (a["x"], a["weight"], a["bias"], a["norm_weight"], EPS, False, a["residual"])
    return torch.ops.fastshard.linear.default(*args, variant)


@CUDA_ONLY
def test_runs_the_variant(device):
    a = make(3, 24, 64, torch.float16, device, ())
    assert torch.equal(raw_linear(a, "stream"), raw_linear(a, "auto"))
    for variant, is_ours in (("stream", True), ("auto", True), ("library", False)):
        names = cuda_kernel_names(lambda variant=variant: raw_linear(a, variant))
        assert any("linear_kernel" in name for name in names) == is_ours


@CUDA_ONLY
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_replays_in_a_graph(num_tokens, device):
    a = make(num_tokens, 96, 256, torch.float16, device)
    assert_replays_in_a_graph(lambda: ops.linear(norm_eps=EPS, **a), a["x"])


@CUDA_ONLY
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16])
def test_runs_one_kernel_of_ours(num_tokens, device):
    a = make(num_tokens, 96, 256, torch.float16, device)
    names = cuda_kernel_names(lambda: ops.linear(norm_eps=EPS, **a))
    assert len(names) == 1
    assert "fastshard::linear_kernel<" in names[0]


def test_cost():
    a = make(3, 24, 64, torch.float16, "cpu")
    args = (a["x"], a["weight"], a["bias"], a["norm_weight"], EPS, False, a["residual"])
    # x, weight, bias, norm_weight, residual, out; a multiply-add is two operations
    numel = 3 * 64 + 24 * 64 + 24 + 64 + 3 * 24 + 3 * 24
    assert ops.COSTS["linear"](*args) == ops.Cost(bytes=2 * numel, flops=2 * 3 * 24 * 64)
