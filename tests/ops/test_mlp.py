"""fused_mlp: every device against float64, and the registration against opcheck."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastshard import ops
from helpers import (
    CUDA_ONLY,
    EMULATOR_ONLY,
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
NAN = float("nan")
TILES = ["tiles_128x256", "tiles_128x128", "tiles_64x128"]
VARIANTS = ["library", "tiles", *TILES]
FP16_SUMS = "tiles_fp16_accumulation"  # float16 only
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}


def eager(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    residual: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Every product and sum rounded to the dtype of the arguments, as eager PyTorch does."""
    gate, up = F.linear(x, gate_up_weight[0::2]), F.linear(x, gate_up_weight[1::2])
    out = F.linear(ACTIVATIONS[activation](gate) * up, down_weight)
    return out if residual is None else out + residual


def golden(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    residual: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The sums in float64, of a hidden that is rounded where the specification rounds it."""
    gate_up = x.double() @ gate_up_weight.double().T
    hidden = ACTIVATIONS[activation](gate_up[..., 0::2]) * gate_up[..., 1::2]
    out = hidden.to(x.dtype).double() @ down_weight.double().T
    return out if residual is None else out + residual.double()


def make(num_tokens, hidden_size, intermediate_size, dtype, device):
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    return {
        "x": rand(num_tokens, hidden_size),
        "gate_up_weight": rand(2 * intermediate_size, hidden_size) / hidden_size**0.5,
        "down_weight": rand(hidden_size, intermediate_size) / intermediate_size**0.5,
        "residual": rand(num_tokens, hidden_size),
    }


def check(arguments: dict) -> None:
    actual = ops.fused_mlp(**arguments)
    assert actual.is_contiguous()
    assert_as_accurate(actual, golden(**arguments), eager(**arguments))


def run_variant(arguments: dict, variant: str, activation: str = "silu") -> Tensor:
    a = arguments
    return torch.ops.fastshard.fused_mlp.default(
        a["x"], a["gate_up_weight"], a["down_weight"], activation, a["residual"], variant
    )


def check_variant(arguments: dict, variant: str, activation: str = "silu") -> None:
    actual = run_variant(arguments, variant, activation)
    assert actual.is_contiguous()
    arguments = {**arguments, "activation": activation}
    assert_as_accurate(actual, golden(**arguments), eager(**arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_rows(num_tokens, dtype, device):
    check(make(num_tokens, 72, 88, dtype, device))


# The library path takes 4096 rows at a time.
@pytest.mark.parametrize("num_tokens", [4096, 4097, 8200])
def test_many_rows(num_tokens, device):
    a = make(num_tokens, 16, 24, torch.bfloat16, device)
    check(a)
    check(a | {"residual": None})
    check(a | {name: a[name].unflatten(0, (1, -1)) for name in ("x", "residual")})


# A tile is 8 rows of a weight (4 of hidden), a warp takes 128 columns of it at a time.
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("hidden_size", [8, 16, 24, 32, 40, 128, 136, 520])
@pytest.mark.parametrize("intermediate_size", [8, 16, 24, 64, 72, 136, 520])
def test_sizes(intermediate_size, hidden_size, num_tokens, dtype, device):
    check(make(num_tokens, hidden_size, intermediate_size, dtype, device))


# x and hidden in several chunks, and in more than the four that registers hold; several groups of
# tiles a block. More than 8 rows: down in parts.
@pytest.mark.parametrize("num_tokens", [8, 16])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"),
    [(264, 2056), (2056, 264), (24, 4104), (4104, 24), (8, 8200)],
)
def test_chunks(hidden_size, intermediate_size, num_tokens, device):
    check(make(num_tokens, hidden_size, intermediate_size, torch.bfloat16, device))


# Launches leave their hidden values and sums to the next but one, of whatever size.
def test_launches_of_different_sizes(device):
    sizes = [(1, 40, 72), (16, 24, 4104), (3, 72, 40), (12, 8, 16), (16, 24, 4104), (2, 40, 72)]
    for num_tokens, hidden_size, intermediate_size in sizes * 2:
        check(make(num_tokens, hidden_size, intermediate_size, torch.float16, device))


# NaN marks what has not been written: one that was computed must not be waited for.
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "intermediate_size"), [(2, 40), (12, 4104)])
def test_nan_goes_through(num_tokens, intermediate_size, dtype, device):
    a = make(num_tokens, 24, intermediate_size, dtype, device)
    a["x"][1] = torch.tensor(-1, dtype=torch.int16).view(dtype).item()
    actual = ops.fused_mlp(**a)
    assert actual[1].isnan().all()
    assert actual[0].isfinite().all()


@CUDA_ONLY
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(896, 4864), (4096, 11008), (3584, 18944)]
)
def test_model_sizes(hidden_size, intermediate_size, dtype, device):
    check(make(3, hidden_size, intermediate_size, dtype, device))


# Tiles are 64 or 128 rows; the last rows of one repeat, but for what is stored.
@KERNELS_ONLY
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("variant", TILES)
def test_rows_of_tiles(variant, num_tokens, dtype, device):
    check_variant(make(num_tokens, 72, 88, dtype, device), variant)


# Tiles are 128 or 256 columns of hidden_size, or of twice intermediate_size, by 32 columns a stage.
@KERNELS_ONLY
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"),
    [(8, 8), (24, 56), (32, 64), (40, 72), (120, 120), (128, 128), (136, 136), (256, 8), (264, 32)],
)
@pytest.mark.parametrize("variant", TILES)
def test_sizes_of_tiles(variant, hidden_size, intermediate_size, dtype, device):
    check_variant(make(70, hidden_size, intermediate_size, dtype, device), variant)


# More tiles than blocks of the emulator, in more than one band of 16 rows of tiles.
@KERNELS_ONLY
@pytest.mark.parametrize("variant", TILES)
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "intermediate_size"), [(2200, 24, 40), (300, 264, 776)]
)
def test_many_tiles(num_tokens, hidden_size, intermediate_size, variant, device):
    check_variant(make(num_tokens, hidden_size, intermediate_size, torch.bfloat16, device), variant)


@KERNELS_ONLY
@pytest.mark.parametrize("num_tokens", [1, 127, 129, 300])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(8, 8), (40, 72), (136, 120), (264, 136)]
)
def test_sizes_of_fp16_sums(num_tokens, hidden_size, intermediate_size, device):
    a = make(num_tokens, hidden_size, intermediate_size, torch.float16, device)
    check_variant(a, FP16_SUMS)


def run_down(hidden: Tensor, weight: Tensor, residual: Tensor | None, variant: str) -> Tensor:
    """``hidden @ weight.T`` plus ``residual``: the first product is exact.

    Args:
        hidden: ``[hidden_size, intermediate_size]``.
        weight: ``[hidden_size, intermediate_size]``.
        residual: ``[hidden_size, hidden_size]`` or ``None``.
        variant: Of the raw op.
    """
    x = torch.eye(len(hidden), dtype=hidden.dtype, device=hidden.device)
    gate_up = torch.stack([hidden.abs(), hidden.sign()], dim=2).flatten(1, 2).T.contiguous()
    arguments = {"x": x, "gate_up_weight": gate_up, "down_weight": weight, "residual": residual}
    return run_variant(arguments, variant, "relu")


def error_of_sums(variant: str, device: torch.device) -> float:
    """Of sums of 4096 normal products, before they are rounded: RMS, of an RMS of 1."""
    hidden, weight = torch.randn(2, 16, 4096, dtype=torch.float16, device=device)
    weight /= 64
    golden = hidden.double() @ weight.double().T
    residual = -golden.half()  # leaves values that float16 rounds by little
    left = run_down(hidden, weight, residual, variant).double() - (golden + residual.double())
    return left.square().mean().sqrt().item()


# 256 sums of 16 products, each rounded to 11 bits, err as much as one such rounding of their sum:
# 2e-4 of it. PTX lets hardware round more often, or cut; tensor cores' float32 sums err by 5e-6.
@KERNELS_ONLY
def test_error_of_fp16_sums(device):
    assert error_of_sums("tiles_64x128", device) < 1e-5
    assert 1e-4 < error_of_sums(FP16_SUMS, device) < 4e-4


# Sums of 16 products are below 2048, and so exact; those of 2048 are beyond what float16 holds.
@KERNELS_ONLY
def test_fp16_sums_are_added_in_float32(device):
    hidden, weight = torch.randint(4, 9, (2, 16, 4096), device=device).half()
    weight[:, 2048:] *= -1
    assert (hidden[:, :2048].double() @ weight[:, :2048].double().T).min() > 65504
    expected = (hidden.double() @ weight.double().T).half()
    assert torch.equal(run_down(hidden, weight, None, FP16_SUMS), expected)


@pytest.fixture
def allow_fp16_accumulation():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


# Up to 64 rows wait for the weights.
@EMULATOR_ONLY
@pytest.mark.parametrize(("num_tokens", "variant"), [(16, "auto"), (64, "tiles"), (65, FP16_SUMS)])
def test_fp16_accumulation_is_for_many_rows(num_tokens, variant, device):
    a = make(num_tokens, 264, 136, torch.float16, device)
    in_float32 = ops.fused_mlp(**a)
    assert torch.equal(in_float32, run_variant(a, "auto"))
    actual = ops.fused_mlp(**a, fp16_accumulation=True)
    assert torch.equal(actual, run_variant(a, variant))
    assert torch.equal(actual, in_float32) == (variant != FP16_SUMS)


@EMULATOR_ONLY
@pytest.mark.usefixtures("allow_fp16_accumulation")
@pytest.mark.parametrize("compiled", [False, True])
def test_fp16_accumulation_where_torch_allows_it(compiled, device):
    a = make(70, 264, 136, torch.float16, device)
    function = ops.fused_mlp
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**a), run_variant(a, FP16_SUMS))
    assert torch.equal(function(**a, fp16_accumulation=False), run_variant(a, "auto"))


@pytest.mark.usefixtures("allow_fp16_accumulation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp16_accumulation_is_of_float16(dtype, device):
    a = make(70, 72, 40, dtype, device)
    expected = ops.fused_mlp(**a, fp16_accumulation=False)
    assert torch.equal(ops.fused_mlp(**a), expected)
    with pytest.raises(TypeError, match=f"fp16_accumulation takes x of torch.float16, got {dtype}"):
        ops.fused_mlp(**a, fp16_accumulation=True)


@CUDA_ONLY
@pytest.mark.parametrize("num_tokens", [128, 520, 2048])
def test_model_sizes_of_fp16_sums(num_tokens, device):
    check_variant(make(num_tokens, 3584, 9480, torch.float16, device), FP16_SUMS)


@CUDA_ONLY
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [33, 520, 2048])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_sizes_of_variants(variant, num_tokens, dtype, device):
    check_variant(make(num_tokens, 3584, 9480, dtype, device), variant)


# All sum over the same columns in the same order.
@KERNELS_ONLY
@pytest.mark.parametrize("num_tokens", [20, 200])
def test_tile_sizes_give_the_same(num_tokens, device):
    a = make(num_tokens, 264, 136, torch.bfloat16, device)
    first, *others = (run_variant(a, variant) for variant in TILES)
    for other in others:
        assert torch.equal(first, other)


@KERNELS_ONLY
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("variant", [*VARIANTS, FP16_SUMS])
def test_activations_of_variants(variant, activation, with_residual, device):
    a = make(20, 72, 40, torch.float16, device)
    if not with_residual:
        a["residual"] = None
    check_variant(a, variant, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, with_residual, num_tokens, dtype, device):
    a = make(num_tokens, 72, 40, dtype, device)
    if not with_residual:
        a["residual"] = None
    check({**a, "activation": activation})


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_large_gates_stay_finite(activation, device):
    a = make(2, 64, 64, torch.bfloat16, device)
    a["gate_up_weight"][0::2] *= 300
    check({**a, "activation": activation})


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_hidden_is_rounded(num_tokens, device):
    # One row of the identity after another: the output is the hidden value itself.
    x = torch.eye(num_tokens, 64, dtype=torch.float16, device=device)
    gate_up = torch.randn(128, 64, dtype=torch.float16, device=device)
    down = torch.eye(64, dtype=torch.float16, device=device)
    actual = ops.fused_mlp(x, gate_up, down, activation="relu")
    gate, up = gate_up[0::2, :num_tokens].T.float(), gate_up[1::2, :num_tokens].T.float()
    assert torch.equal(actual, (gate.relu() * up).half())


@pytest.mark.parametrize("shape", [(0, 72), (2, 3, 72), (72,), (2, 0, 72), (3, 7, 72)], ids=str)
def test_leading_dims(shape, device):
    a = make(1, 72, 40, torch.float16, device)
    weights = a["gate_up_weight"], a["down_weight"]
    x = torch.randn(shape, dtype=torch.float16, device=device)
    actual = ops.fused_mlp(x, *weights, residual=x)
    assert actual.shape == x.shape
    assert_same(
        actual, ops.fused_mlp(x.view(-1, 72), *weights, residual=x.view(-1, 72)).view(shape)
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal float16 values, but for where torch's matmul served one of them.

    It may sum in another order, and rounds before the bias and the residual are added: half an ulp
    of up to 16, which is 2^-7, for each.
    """
    torch.testing.assert_close(actual, expected, rtol=2**-10, atol=2**-6)


def inside_nan(arguments: dict) -> dict:
    """The same values with NaN around each row, and before and after all rows."""
    strided = {}
    for name, tensor in arguments.items():
        rows, columns = tensor.shape
        padded = tensor.new_full((rows + 2, columns + 24), NAN)
        strided[name] = padded[1:-1, 8 : 8 + columns]
        strided[name].copy_(tensor)
    return strided


@pytest.mark.parametrize("num_tokens", [5, 20])
def test_memory_around_the_arguments_is_not_read(num_tokens, device):
    a = make(num_tokens, 72, 40, torch.float16, device)
    assert_same(ops.fused_mlp(**inside_nan(a)), ops.fused_mlp(**a))


@KERNELS_ONLY
@pytest.mark.parametrize("variant", [*TILES, FP16_SUMS])
def test_tiles_read_nothing_around_the_arguments(variant, device):
    a = make(70, 72, 40, torch.float16, device)
    assert torch.equal(run_variant(inside_nan(a), variant), run_variant(a, variant))


@pytest.mark.parametrize("name", ["x", "gate_up_weight", "down_weight", "residual"])
@pytest.mark.parametrize("num_tokens", [5, 20])
def test_unaligned_arguments(num_tokens, name, device):
    a = make(num_tokens, 72, 40, torch.float16, device)
    shifted = torch.full((a[name].numel() + 1,), NAN, dtype=torch.float16, device=device)[1:]
    shifted = shifted.view(a[name].shape).copy_(a[name])
    assert_same(ops.fused_mlp(**{**a, name: shifted}), ops.fused_mlp(**a))


@pytest.mark.parametrize("name", ["x", "gate_up_weight", "down_weight", "residual"])
@pytest.mark.parametrize("num_tokens", [5, 20])
def test_transposed_arguments(num_tokens, name, device):
    a = make(num_tokens, 72, 40, torch.float16, device)
    transposed = {**a, name: a[name].T.contiguous().T}
    assert_same(ops.fused_mlp(**transposed), ops.fused_mlp(**a))


@pytest.mark.parametrize("shape", [(2, 3), (3, 7)], ids=str)
def test_permuted_leading_dims(shape, device):
    a = make(1, 72, 40, torch.float16, device)
    x = torch.randn(*shape, 72, dtype=torch.float16, device=device).transpose(0, 1)
    residual = torch.randn(*shape, 72, dtype=torch.float16, device=device).transpose(0, 1)

    def call(x, residual):
        return ops.fused_mlp(x, a["gate_up_weight"], a["down_weight"], residual=residual)

    actual = call(x, residual)
    assert actual.is_contiguous()
    assert_same(actual, call(x.contiguous(), residual.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(12, 40), (72, 5), (1, 1)])
def test_sizes_of_no_whole_vector(hidden_size, intermediate_size, num_tokens, dtype, device):
    check(make(num_tokens, hidden_size, intermediate_size, dtype, device))


def test_rejects_wrong_arguments(device):
    a = make(2, 64, 40, torch.float16, device)

    def call(**changed):
        return ops.fused_mlp(**{**a, **changed})

    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch.int32"):
        call(x=a["x"].int())
    with pytest.raises(ValueError, match=r"x must have rows of at least 1 element, got shape \[\]"):
        call(x=a["x"][0, 0])
    for weight, shape in [
        (a["gate_up_weight"][:79], r"\[79, 64\]"),
        (a["gate_up_weight"][:, :63], r"\[80, 63\]"),
        (a["gate_up_weight"][:0], r"\[0, 64\]"),
        (a["gate_up_weight"][0], r"\[64\]"),
    ]:
        rule = r"gate_up_weight must have shape \[2 \* intermediate_size, 64\], got "
        with pytest.raises(ValueError, match=rule + shape):
            call(gate_up_weight=weight)
    with pytest.raises(ValueError, match=r"down_weight must have shape \[64, 40\], got \[40, 64\]"):
        call(down_weight=a["down_weight"].T)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 64\], got \[1, 64\]"):
        call(residual=a["residual"][:1])
    with pytest.raises(
        ValueError, match=r"activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"
    ):
        call(activation="tanh")
    for name in ("gate_up_weight", "down_weight", "residual"):
        with pytest.raises(TypeError, match=rf"{name} must be torch.float16, got torch.bfloat16"):
            call(**{name: a[name].bfloat16()})
        with pytest.raises(ValueError, match=rf"{name} must be on {device.type}(:0)?, got meta"):
            call(**{name: a[name].to("meta")})


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("gate_up_weight", slice(79), r"weights must be \[2 \* intermediate_size, 64\] and"),
        ("down_weight", slice(63), r"weights must be .* and \[64, intermediate_size\]"),
        ("residual", slice(1), r"residual must have the shape of x"),
    ],
)
def test_raw_op_guards_memory(name, part, message, device):
    a = make(2, 64, 40, torch.float16, device)
    a[name] = a[name][part]
    args = (a["x"], a["gate_up_weight"], a["down_weight"], "silu", a["residual"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastshard.fused_mlp.default(*args)


@KERNELS_ONLY
def test_raw_op_rejects_another_variant(device):
    a = make(2, 64, 40, torch.float16, device)
    with pytest.raises(RuntimeError, match=r"variant must be auto, .*, got tile"):
        run_variant(a, "tile")


@KERNELS_ONLY
@pytest.mark.parametrize("variant", ["auto_fp16_accumulation", FP16_SUMS])
def test_raw_op_sums_no_bfloat16_in_fp16(variant, device):
    a = make(2, 64, 40, torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=f"variant {variant} takes float16 only"):
        run_variant(a, variant)


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_traces_without_a_graph_break(num_tokens, device):
    a = make(num_tokens, 64, 40, torch.float16, device)

    def function(x):
        return ops.fused_mlp(x * 2, a["gate_up_weight"], a["down_weight"], residual=a["residual"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a["x"]), function(a["x"]))


def test_compiles_once_for_all_sizes(device):
    sizes = [(3, 64, 40), (17, 64, 40), (5, 72, 24)]
    assert_compiles_once(ops.fused_mlp, (make(*size, torch.float16, device) for size in sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 17])
def test_ignores_autocast(num_tokens, dtype, device):
    assert_ignores_autocast(ops.fused_mlp, make(num_tokens, 64, 40, dtype, device))


def test_refuses_gradients(device):
    assert_refuses_gradients(ops.fused_mlp, make(3, 64, 40, torch.float16, device))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("num_tokens", [3, 17])
def test_opcheck(num_tokens, with_residual, device):
    a = make(num_tokens, 64, 40, torch.float16, device)
    residual = a["residual"] if with_residual else None
    args = (a["x"], a["gate_up_weight"], a["down_weight"], "gelu", residual)
    torch.library.opcheck(torch.ops.fastshard.fused_mlp.default, args)


@CUDA_ONLY
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_replays_in_a_graph(num_tokens, device):
    a = make(num_tokens, 256, 96, torch.float16, device)
    assert_replays_in_a_graph(lambda: ops.fused_mlp(**a), a["x"])


@CUDA_ONLY
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_runs_one_kernel_of_ours(num_tokens, device):
    a = make(num_tokens, 256, 96, torch.float16, device)
    names = cuda_kernel_names(lambda: ops.fused_mlp(**a))
    assert len(names) == 1
    assert "fastshard::fused_mlp_kernel" in names[0]


@CUDA_ONLY
@pytest.mark.parametrize("variant", [*TILES, FP16_SUMS])
def test_tiles_replay_in_a_graph(variant, device):
    a = make(200, 256, 96, torch.float16, device)
    assert_replays_in_a_graph(lambda: run_variant(a, variant), a["x"])


@CUDA_ONLY
@pytest.mark.parametrize("variant", ["auto", "auto_fp16_accumulation", *VARIANTS, FP16_SUMS])
def test_kernels_of_many_rows(variant, device):
    a = make(200, 256, 96, torch.float16, device)
    names = cuda_kernel_names(lambda: run_variant(a, variant))
    ours = sum("fastshard::gemm_kernel" in name for name in names)
    is_auto = variant.startswith("auto")
    tiles = torch.cuda.get_device_capability()[0] == 8 if is_auto else "tiles" in variant
    assert ours == 2 * tiles
    assert not tiles or len(names) == 2
    assert all(("Fp16Sums" in name) == ("fp16" in variant) for name in names if tiles)


@EMULATOR_ONLY
@pytest.mark.parametrize(("num_tokens", "intermediate_size"), [(3, 264), (16, 264), (16, 4104)])
def test_plain_launches_give_the_same(num_tokens, intermediate_size, device, monkeypatch):
    a = make(num_tokens, 40, intermediate_size, torch.bfloat16, device)
    one_launch = ops.fused_mlp(**a)
    monkeypatch.setenv("FASTSHARD_EMULATOR_COOPERATIVE", "0")
    for _ in range(3):
        assert torch.equal(ops.fused_mlp(**a), one_launch)


def test_cost():
    a = make(3, 64, 40, torch.float16, "cpu")
    args = (a["x"], a["gate_up_weight"], a["down_weight"], "silu", a["residual"])
    # x, both weights, residual, out; a multiply-add is two operations
    numel = 3 * 64 + 3 * 40 * 64 + 3 * 64 + 3 * 64
    assert ops.COSTS["fused_mlp"](*args) == ops.Cost(bytes=2 * numel, flops=2 * 3 * 3 * 40 * 64)
