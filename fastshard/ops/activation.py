"""Gated activations: the elementwise middle of a gated MLP.

CUDA kernel: csrc/activation, bound in csrc/ops/activation.cpp. The CPU reference is the
specification.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastshard.ops._autograd import call_differentiable
from fastshard.ops._checks import check_floating
from fastshard.ops._library import Cost, cost, define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The names that ops take as ``activation``, and what each computes."""

_ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward.default, threshold=0),
}
"""Gradients of the same, of the output's gradient and the input."""

define("act_and_mul(Tensor gate_up, str activation, bool interleaved) -> Tensor")
define("silu_and_mul(Tensor gate_up, bool interleaved) -> Tensor")


def act_and_mul(gate_up: Tensor, *, activation: str = "silu", interleaved: bool = False) -> Tensor:
    """Multiply ``activation(gate)`` by up, both packed in one tensor.

    Args:
        gate_up: ``[..., 2 * intermediate_size]``, float32, float16 or bfloat16; any strides.
        activation: "silu", "gelu" (by erf), "gelu_tanh" or "relu".
        interleaved: Columns are ``g0, u0, g1, u1, ...``; else all gates, then all ups.

    Returns:
        ``[..., intermediate_size]``, contiguous, dtype of ``gate_up``. Computed in float32,
        rounded once.

    Raises:
        ValueError: The last dimension of ``gate_up`` is missing or odd, or ``activation`` is none
            of the above.
        TypeError: ``gate_up`` has another dtype.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), eq. 5.
    """
    _check_gate_up(gate_up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    op = torch.ops.fastshard.act_and_mul.default
    return call_differentiable(op, gate_up, activation, interleaved)


def silu_and_mul(gate_up: Tensor, *, interleaved: bool = False) -> Tensor:
    """Multiply ``silu(gate)`` by up: :func:`act_and_mul` with the activation of Llama and Qwen.

    Args:
        gate_up: ``[..., 2 * intermediate_size]``, float32, float16 or bfloat16; any strides.
        interleaved: Columns are ``g0, u0, g1, u1, ...``; else all gates, then all ups.

    Returns:
        ``[..., intermediate_size]``, contiguous, dtype of ``gate_up``.

    Raises:
        ValueError: The last dimension of ``gate_up`` is missing or odd.
        TypeError: ``gate_up`` has another dtype.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), eq. 5.
    """
    _check_gate_up(gate_up)
    return call_differentiable(torch.ops.fastshard.silu_and_mul.default, gate_up, interleaved)


def _check_gate_up(gate_up: Tensor) -> None:
    check_floating("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up must have an even last dimension, got shape {list(gate_up.shape)}"
        )


@torch.library.register_fake("fastshard::act_and_mul")
def _(gate_up: Tensor, activation: str, interleaved: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("fastshard::silu_and_mul")
def _(gate_up: Tensor, interleaved: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _separate(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the gates and the ups."""
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    return gate_up.chunk(2, dim=-1)


def _reference(gate_up: Tensor, activation: str, interleaved: bool) -> Tensor:
    gate, up = _separate(gate_up, interleaved)
    product = ACTIVATIONS[activation](gate.float()) * up.float()
    return product.to(gate_up.dtype).contiguous()


torch.library.impl("fastshard::act_and_mul", "cpu", _reference)


@torch.library.impl("fastshard::silu_and_mul", "cpu")
def _(gate_up: Tensor, interleaved: bool) -> Tensor:
    return _reference(gate_up, "silu", interleaved)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    gate_up, *ctx.settings = inputs
    ctx.save_for_backward(gate_up)


def _gradient(ctx, grad: Tensor, activation: str, interleaved: bool) -> Tensor:
    """Of ``gate_up``, computed in float32 and rounded once."""
    (gate_up,) = ctx.saved_tensors
    gate, up = (half.float() for half in _separate(gate_up, interleaved))
    grad32 = grad.float()
    dgate = _ACTIVATION_BACKWARDS[activation](grad32 * up, gate)
    dup = grad32 * ACTIVATIONS[activation](gate)
    if interleaved:
        return torch.stack((dgate, dup), dim=-1).flatten(-2).to(grad.dtype)
    return torch.cat((dgate, dup), dim=-1).to(grad.dtype)


def _act_and_mul_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _gradient(ctx, grad, *ctx.settings), None, None


def _silu_and_mul_backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return _gradient(ctx, grad, "silu", *ctx.settings), None


torch.library.register_autograd(
    "fastshard::act_and_mul", _act_and_mul_backward, setup_context=_save
)
torch.library.register_autograd(
    "fastshard::silu_and_mul", _silu_and_mul_backward, setup_context=_save
)


@cost("act_and_mul")
def _cost(gate_up: Tensor, activation: str, interleaved: bool) -> Cost:
    # An activation counts as four operations, as one multiply-add each of its exp and division.
    num_outputs = gate_up.numel() // 2
    return Cost(bytes=3 * num_outputs * gate_up.element_size(), flops=5 * num_outputs)


@cost("silu_and_mul")
def _(gate_up: Tensor, interleaved: bool) -> Cost:
    return _cost(gate_up, "silu", interleaved)
