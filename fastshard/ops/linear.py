"""Linear layer with optional RMSNorm prologue, bias and residual.

CUDA: csrc/gemv streams the weights once for 1 to 16 rows, torch's matmul serves more; both bound
in csrc/ops/linear.cpp. The CPU reference is the specification: it fixes where values are rounded.
"""

import torch
from torch import Tensor

from fastshard.ops._autograd import inference_only, refuse_gradients
from fastshard.ops._checks import check_floating, check_like, check_shape
from fastshard.ops._library import Cost, cost, define

define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float norm_eps, "
    "bool weight_in_fp32, Tensor? residual, str variant='auto') -> Tensor"
)
inference_only("linear", "torch.nn.functional.linear")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_in_fp32: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + (rms_norm(x) @ weight.T + bias)``.

    Args:
        x: ``[..., in_features]``, float32, float16 or bfloat16; any strides.
        weight: ``[out_features, in_features]``, dtype and device of ``x``; any strides, but only a
            contiguous one is read in place.
        bias: ``[out_features]`` or ``None``.
        norm_weight: ``[in_features]``; with it ``x`` goes through :func:`rms_norm` first.
        norm_eps: ``eps`` of that norm.
        weight_in_fp32: ``weight_in_fp32`` of that norm.
        residual: ``[..., out_features]`` or ``None``; any strides.

    Returns:
        ``[..., out_features]``, contiguous, dtype of ``x``. The norm is rounded to the dtype, the
        rest is summed in float32 and rounded once.

    Raises:
        ValueError: A shape or device does not fit, or a norm is asked of rows that are not a
            multiple of 16 bytes.
        TypeError: ``x`` has another dtype, or another tensor not that of ``x``.
        RuntimeError: A gradient is asked for, which this op has not.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have rows of at least 1 element, got shape {list(x.shape)}")
    in_features = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise ValueError(
            f"weight must have shape [out_features, {in_features}], got {list(weight.shape)}"
        )
    check_like("weight", weight, x)
    out_features = weight.shape[0]
    if bias is not None:
        check_like("bias", bias, x)
        check_shape("bias", bias, (out_features,))
    if norm_weight is not None:
        check_like("norm_weight", norm_weight, x)
        check_shape("norm_weight", norm_weight, (in_features,))
        if in_features * x.element_size() % 16:
            raise ValueError(
                f"x must have rows of a multiple of 16 bytes for a norm, got shape {list(x.shape)}"
            )
    if residual is not None:
        check_like("residual", residual, x)
        check_shape("residual", residual, (*x.shape[:-1], out_features))
    if torch.is_grad_enabled():
        tensors = {"bias": bias, "norm_weight": norm_weight, "residual": residual}
        refuse_gradients("linear", x=x, weight=weight, **tensors)
    return torch.ops.fastshard.linear.default(
        x, weight, bias, norm_weight, norm_eps, weight_in_fp32, residual
    )


def matmul_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T`` in float32, with no float32 copy of a whole large weight.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.

    Returns:
        ``[..., out_features]``, float32.
    """
    x = x.float()
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight)
    rows = max(1, 2**24 // weight.shape[1])  # 64 MiB of float32 at a time
    parts = [torch.nn.functional.linear(x, part.float()) for part in weight.split(rows)]
    return torch.cat(parts, dim=-1)


@torch.library.register_fake("fastshard::linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    weight_in_fp32: bool,
    residual: Tensor | None,
    variant: str = "auto",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl("fastshard::linear", "cpu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    weight_in_fp32: bool,
    residual: Tensor | None,
    variant: str = "auto",
) -> Tensor:
    if norm_weight is not None:
        x = torch.ops.fastshard.rms_norm.default(x, norm_weight, norm_eps, weight_in_fp32)
    out = matmul_in_float32(x, weight)
    if bias is not None:
        out = out + bias.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype).contiguous()


@cost("linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    weight_in_fp32: bool,
    residual: Tensor | None,
    variant: str = "auto",
) -> Cost:
    num_tokens = x.numel() // x.shape[-1]
    read = [t for t in (x, weight, bias, norm_weight, residual) if t is not None]
    numel = sum(t.numel() for t in read) + num_tokens * weight.shape[0]
    return Cost(bytes=numel * x.element_size(), flops=2 * num_tokens * weight.numel())
