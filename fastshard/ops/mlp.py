"""Gated MLP as one op: schema, checks, public function, fake kernel, CPU reference, cost.

CUDA: csrc/mlp runs 1 to 16 rows in one launch. More rows go, by the raw op's ``variant``, to two
products by tiles on tensor cores (csrc/gemm) or to torch's matmul and the activation kernel; csrc/
ops/mlp.cpp binds all and chooses. The CPU reference is the specification: it fixes where values
are rounded.
"""

import torch
from torch import Tensor

from fastshard.ops._autograd import inference_only, refuse_gradients
from fastshard.ops._checks import check_floating, check_like, check_shape
from fastshard.ops._library import Cost, cost, define
from fastshard.ops.activation import ACTIVATIONS
from fastshard.ops.linear import matmul_in_float32

define(
    "fused_mlp(Tensor x, Tensor gate_up_weight, Tensor down_weight, str activation, "
    "Tensor? residual, str variant='auto') -> Tensor"
)
inference_only("fused_mlp", "torch.nn.functional.linear and fastshard.ops.act_and_mul")


def fused_mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    activation: str = "silu",
    residual: Tensor | None = None,
    fp16_accumulation: bool | None = None,
) -> Tensor:
    """Compute ``residual + (activation(x @ gate.T) * (x @ up.T)) @ down.T``.

    Args:
        x: ``[..., hidden_size]``, float32, float16 or bfloat16; any strides.
        gate_up_weight: ``[2 * intermediate_size, hidden_size]``, rows interleaved gate 0, up 0,
            gate 1, up 1, ...; dtype and device of ``x``.
        down_weight: ``[hidden_size, intermediate_size]``.
        activation: ``silu``, ``gelu`` (with erf), ``gelu_tanh`` or ``relu``.
        residual: ``[..., hidden_size]`` or ``None``; any strides.
        fp16_accumulation: Let the products of more than 64 rows on compute capability 8.x add 16
            values at a time in float16, and only such sums in float32. A sum of 16 that passes
            65504 becomes infinite. ``None`` asks ``torch.backends.cuda.matmul.
            allow_fp16_accumulation`` (False unless set) where ``x`` is float16; ``torch.compile``
            asks when it compiles. No effect elsewhere.

    Returns:
        ``[..., hidden_size]``, contiguous, dtype of ``x``. Sums in float32, but for
        ``fp16_accumulation``; the product of gate and up is rounded to the dtype before the second
        matrix, the output once.

    Raises:
        ValueError: A shape or device does not fit, or ``activation`` is unknown.
        TypeError: ``x`` has another dtype, or another tensor not that of ``x``; or
            ``fp16_accumulation`` is True and ``x`` not float16.
        RuntimeError: A gradient is asked for, which this op has not.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have rows of at least 1 element, got shape {list(x.shape)}")
    hidden_size = x.shape[-1]
    rows = gate_up_weight.shape[0] if gate_up_weight.dim() == 2 else 0
    if rows == 0 or rows % 2 or gate_up_weight.shape[1] != hidden_size:
        raise ValueError(
            f"gate_up_weight must have shape [2 * intermediate_size, {hidden_size}], "
            f"got {list(gate_up_weight.shape)}"
        )
    check_like("gate_up_weight", gate_up_weight, x)
    check_like("down_weight", down_weight, x)
    check_shape("down_weight", down_weight, (hidden_size, rows // 2))
    if residual is not None:
        check_like("residual", residual, x)
        check_shape("residual", residual, x.shape)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if fp16_accumulation and x.dtype != torch.float16:
        raise TypeError(f"fp16_accumulation takes x of torch.float16, got {x.dtype}")
    if fp16_accumulation is None:
        fp16_accumulation = x.dtype == torch.float16 and _torch_allows_fp16_accumulation()
    variant = "auto_fp16_accumulation" if fp16_accumulation else "auto"
    if torch.is_grad_enabled():
        weights = {"gate_up_weight": gate_up_weight, "down_weight": down_weight}
        refuse_gradients("fused_mlp", x=x, **weights, residual=residual)
    return torch.ops.fastshard.fused_mlp.default(
        x, gate_up_weight, down_weight, activation, residual, variant
    )


def _torch_allows_fp16_accumulation() -> bool:
    return torch.backends.cuda.matmul.allow_fp16_accumulation


# What torch.compiler.assume_constant_result does, which imports the compiler, for seconds, to do it
_torch_allows_fp16_accumulation._dynamo_marked_constant = True


@torch.library.register_fake("fastshard::fused_mlp")
def _(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    activation: str,
    residual: Tensor | None,
    variant: str = "auto",
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("fastshard::fused_mlp", "cpu")
def _(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    activation: str,
    residual: Tensor | None,
    variant: str = "auto",
) -> Tensor:
    gate, up = matmul_in_float32(x, gate_up_weight).unflatten(-1, (-1, 2)).unbind(-1)
    hidden = (ACTIVATIONS[activation](gate) * up).to(x.dtype)
    out = matmul_in_float32(hidden, down_weight)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype).contiguous()


@cost("fused_mlp")
def _(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    activation: str,
    residual: Tensor | None,
    variant: str = "auto",
) -> Cost:
    weights = gate_up_weight.numel() + down_weight.numel()
    numel = 2 * x.numel() + weights + (0 if residual is None else residual.numel())
    num_tokens = x.numel() // x.shape[-1]
    return Cost(bytes=numel * x.element_size(), flops=2 * num_tokens * weights)
