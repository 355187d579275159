"""Normalisation ops: for each, schema, checks, public function, fake kernel, CPU reference, cost.

CUDA kernels: csrc/norm, bound in csrc/ops/norm.cpp. The CPU reference is the specification: it
fixes where values are rounded, and tests hold the CUDA kernel to it.
"""

import torch
from torch import Tensor

from fastshard.ops._library import Cost, cost, define

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

define("rms_norm(Tensor x, Tensor weight, float eps, bool weight_in_fp32) -> Tensor")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_in_fp32: bool = False
) -> Tensor:
    """Scale each row of ``x`` to unit root mean square, then by ``weight``.

    Args:
        x: ``[..., hidden_size]``, float32, float16 or bfloat16; any strides.
        weight: ``[hidden_size]``, dtype and device of ``x``.
        eps: Added to the mean square, before the square root.
        weight_in_fp32: Multiply by ``weight`` in float32 and round once, as torchtune; by default
            round to ``x.dtype`` first, as Hugging Face's ``LlamaRMSNorm``.

    Returns:
        ``[..., hidden_size]``, contiguous, dtype of ``x``. Reduced in float32.

    Raises:
        ValueError: ``x`` has no dimension, ``hidden_size`` is not a multiple of 16 bytes, or
            ``weight`` is not ``[hidden_size]``.
        TypeError: ``x`` has another dtype, or ``weight`` not that of ``x``.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    # Plain if/raise: it traces under fullgraph, and gives every device the same error.
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] * x.element_size() % 16:
        raise ValueError(f"x must have rows of a multiple of 16 bytes, got shape {list(x.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype}, got {weight.dtype}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight must have shape [{x.shape[-1]}], got {list(weight.shape)}")
    return torch.ops.fastshard.rms_norm.default(x, weight, eps, weight_in_fp32)


@torch.library.register_fake("fastshard::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, as the kernel writes it


@torch.library.impl("fastshard::rms_norm", "cpu")
def _(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Tensor:
    x32 = x.float()
    x_hat = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    if weight_in_fp32:
        return (x_hat * weight.float()).to(x.dtype).contiguous()
    return (x_hat.to(x.dtype) * weight).contiguous()


@cost("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Cost:
    return Cost(bytes=(2 * x.numel() + weight.numel()) * x.element_size(), flops=4 * x.numel())
