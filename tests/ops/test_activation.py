"""act_and_mul and silu_and_mul: every device against float64, layouts, and the registration."""

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
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def separate(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]


def eager(gate_up: Tensor, activation: str, interleaved: bool) -> Tensor:
    gate, up = separate(gate_up, interleaved)
    return ACTIVATIONS[activation](gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
# 1 to 9: below, at and above one 16-byte vector of outputs; 4104 spans several blocks of a row.
@pytest.mark.parametrize(
    ("num_tokens", "intermediate_size"), [(5, 1), (5, 4), (5, 8), (5, 9), (3, 264), (2, 4104)]
)
def test_matches_float64(num_tokens, intermediate_size, interleaved, activation, dtype, device):
    gate_up = 3 * torch.randn(num_tokens, 2 * intermediate_size, device=device)
    gate_up = gate_up.to(dtype)
    actual = ops.act_and_mul(gate_up, activation=activation, interleaved=interleaved)
    golden = eager(gate_up.double(), activation, interleaved)
    assert_as_accurate(actual, golden, eager(gate_up, activation, interleaved))
    if activation == "silu":
        assert torch.equal(ops.silu_and_mul(gate_up, interleaved=interleaved), actual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(activation, device):
    # No overflow on the way to a finite value, and no NaN lost or made.
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, torch.nan])
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)]).to(device)
    actual = ops.act_and_mul(gate_up, activation=activation)
    expected = eager(gate_up, activation, interleaved=False)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 0), (2, 3, 16), (2, 1, 3, 16)], ids=str)
def test_leading_dims(shape, interleaved, device):
    gate_up = torch.randn(shape, device=device)
    out = ops.silu_and_mul(gate_up, interleaved=interleaved)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    torch.testing.assert_close(out, eager(gate_up, "silu", interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, interleaved, device):
    padded = torch.full((6, 5, 80), torch.nan, dtype=dtype, device=device)
    padded[..., 8:40].normal_()
    for gate_up in (
        padded[..., 8:40],  # aligned rows
        padded[::2, 1:4, 8:40],  # leading dimensions that do not collapse
        padded[..., 9:37],  # unaligned rows
        padded[0, :, 8:40].T.contiguous().T,  # no unit stride
    ):
        out = ops.silu_and_mul(gate_up, interleaved=interleaved)
        assert out.is_contiguous()
        # Close: eager PyTorch's exp differs in the last place between its vector and scalar loops.
        expected = ops.silu_and_mul(gate_up.contiguous(), interleaved=interleaved)
        torch.testing.assert_close(out, expected)


def test_rejects_wrong_arguments(device):
    gate_up = torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match="one of silu, gelu, gelu_tanh, relu, got 'swish'"):
        ops.act_and_mul(gate_up, activation="swish")
    for call in (ops.silu_and_mul, ops.act_and_mul):
        with pytest.raises(ValueError, match=r"even last dimension, got shape \[2, 15\]"):
            call(gate_up[:, :15])
        with pytest.raises(ValueError, match=r"even last dimension, got shape \[\]"):
            call(gate_up[0, 0])
        with pytest.raises(TypeError, match="gate_up must be float32, float16 or bfloat16, got"):
            call(gate_up.double())


@KERNELS_ONLY
def test_raw_ops_guard_memory(device):
    gate_up = torch.randn(2, 16, device=device)
    raw = torch.ops.fastshard
    for call, message in (
        (lambda: raw.silu_and_mul(gate_up[:, :15], False), "even last dimension .* got 15"),
        (lambda: raw.silu_and_mul(gate_up[0, 0], False), "gate_up must have at least 1 dimension"),
        (lambda: raw.silu_and_mul(gate_up.int(), False), "gate_up must be float32, .* got Int"),
        (lambda: raw.act_and_mul(gate_up, "swish", False), "silu, gelu, gelu_tanh, relu, got 'swi"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved, activation, dtype, device):
    def gated(gate_up):
        out = ops.act_and_mul(gate_up, activation=activation, interleaved=interleaved)
        return (out, ops.silu_and_mul(gate_up)) if activation == "silu" else out

    def plain(gate_up):
        out = eager(gate_up, activation, interleaved)
        return (out, eager(gate_up, "silu", False)) if activation == "silu" else out

    gate_up = (3 * torch.randn(2, 3, 24, device=device)).to(dtype)
    assert_gradients_as_accurate(gated, plain, {"gate_up": gate_up})


def test_gradients_of_a_compiled_function(device):
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")

    def plain(gate_up):
        return eager(gate_up, "silu", False), eager(gate_up, "gelu", True)

    gate_up = torch.randn(3, 24, device=device)
    assert_gradients_as_accurate(compiled, plain, {"gate_up": gate_up})


def both(gate_up):
    return ops.silu_and_mul(gate_up), ops.act_and_mul(gate_up, activation="gelu", interleaved=True)


def test_compiles_once_for_all_sizes(device):
    sizes = [(5, 64), (3, 64), (17, 34)]
    assert_compiles_once(both, ({"gate_up": torch.randn(s, device=device)} for s in sizes))


def test_ignores_autocast(device):
    assert_ignores_autocast(both, {"gate_up": torch.randn(3, 64, device=device)})


def test_traces_without_a_graph_break(device):
    gate_up = torch.randn(3, 64, device=device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), both(gate_up))


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved, device):
    gate_up = torch.randn(4, 3, 64, device=device).transpose(0, 1)
    torch.library.opcheck(torch.ops.fastshard.silu_and_mul.default, (gate_up, interleaved))
    act_and_mul = torch.ops.fastshard.act_and_mul.default
    torch.library.opcheck(act_and_mul, (gate_up, "gelu", interleaved))


@CUDA_ONLY
def test_replays_in_a_graph(device):
    gate_up = torch.randn(5, 512, dtype=torch.float16, device=device)
    assert_replays_in_a_graph(lambda: ops.act_and_mul(gate_up, activation="gelu"), gate_up)
    assert_replays_in_a_graph(lambda: ops.silu_and_mul(gate_up, interleaved=True), gate_up)


@CUDA_ONLY
def test_runs_one_kernel_of_ours(device):
    gate_up = torch.randn(5, 512, dtype=torch.float16, device=device)
    for call in (
        lambda: ops.act_and_mul(gate_up, activation="gelu"),
        lambda: ops.silu_and_mul(gate_up[:, :256]),  # strided, without a copy
    ):
        names = cuda_kernel_names(call)
        assert len(names) == 1
        assert "fastshard::act_and_mul_kernel" in names[0]


def test_cost():
    gate_up = torch.zeros(3, 2 * 64, dtype=torch.float16)
    assert ops.COSTS["silu_and_mul"](gate_up, False).bytes == 2 * 3 * 3 * 64
    assert ops.COSTS["act_and_mul"](gate_up, "gelu", True) == ops.COSTS["silu_and_mul"](
        gate_up, True
    )
