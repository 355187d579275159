"""Normalisation ops: for each, schema, checks, public function, fake kernel, CPU reference, cost.

CUDA kernels: csrc/norm, bound in csrc/ops/norm.cpp. The CPU reference is the specification: it
fixes where values are rounded, and tests hold the CUDA kernel to it. The raw ops' ``variant`` says
how many threads hold a row, and how many 16-byte vectors each, like ``256x2``.
"""

import torch
from torch import Tensor

from fastshard.ops import _norm_gradients
from fastshard.ops._autograd import call_differentiable
from fastshard.ops._checks import check_floating, check_like, check_shape
from fastshard.ops._library import Cost, cost, define

MAX_ROW_BYTES = 64 * 1024  # the kernels hold a row in registers: kMaxRowBytes in csrc/norm/row.h

define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool weight_in_fp32, str variant='auto') "
    "-> Tensor"
)
define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool weight_in_fp32, "
    "str variant='auto') -> (Tensor, Tensor)"
)
define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str variant='auto') -> Tensor"
)
define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
    "str variant='auto') -> (Tensor, Tensor)"
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_in_fp32: bool = False
) -> Tensor:
    """Scale each row of ``x`` to unit root mean square, then by ``weight``.

    Args:
        x: ``[..., hidden_size]``, float32, float16 or bfloat16; any strides. A row is a multiple
            of 16 bytes, at most 64 KiB.
        weight: ``[hidden_size]``, dtype and device of ``x``.
        eps: Added to the mean square, before the square root.
        weight_in_fp32: Multiply by ``weight`` in float32 and round once, as torchtune; by default
            round to ``x.dtype`` first, as Hugging Face's ``LlamaRMSNorm``.

    Returns:
        ``[..., hidden_size]``, contiguous, dtype of ``x``. Reduced in float32.

    Raises:
        ValueError: A row of ``x`` is empty, no multiple of 16 bytes or above 64 KiB; ``weight`` is
            not ``[hidden_size]`` or not on the device of ``x``.
        TypeError: ``x`` has another dtype, or ``weight`` not that of ``x``.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    _check_rows(x)
    _check_vector("weight", weight, x)
    return call_differentiable(torch.ops.fastshard.rms_norm.default, x, weight, eps, weight_in_fp32)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream, and normalise the sum as :func:`rms_norm`.

    Args:
        x: ``[..., hidden_size]``, the output of the block before; as in :func:`rms_norm`.
        residual: Shape, dtype and device of ``x``; any strides.
        weight: ``[hidden_size]``, dtype and device of ``x``.
        eps: Added to the mean square, before the square root.
        weight_in_fp32: As in :func:`rms_norm`.

    Returns:
        ``(normed, new_residual)``, both contiguous, of the shape and dtype of ``x``.
        ``new_residual = x + residual``, added in float32 and rounded once; ``normed`` is the norm
        of that rounded sum.

    Raises:
        ValueError: As :func:`rms_norm`; or ``residual`` has not the shape or device of ``x``.
        TypeError: As :func:`rms_norm`; or ``residual`` has not the dtype of ``x``.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    _check_rows(x)
    check_like("residual", residual, x)
    check_shape("residual", residual, x.shape)
    _check_vector("weight", weight, x)
    return call_differentiable(
        torch.ops.fastshard.add_rms_norm.default, x, residual, weight, eps, weight_in_fp32
    )


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Shift and scale each row of ``x`` to mean 0 and variance 1, then by ``weight`` and ``bias``.

    Args:
        x: ``[..., hidden_size]``, as in :func:`rms_norm`.
        weight: ``[hidden_size]``, dtype and device of ``x``; None means ones.
        bias: ``[hidden_size]``, dtype and device of ``x``; None means zeros.
        eps: Added to the variance (biased, about the mean), before the square root.

    Returns:
        ``[..., hidden_size]``, contiguous, dtype of ``x``. Computed in float32, rounded once.

    Raises:
        ValueError: A row of ``x`` is empty, no multiple of 16 bytes or above 64 KiB; ``weight`` or
            ``bias`` is not ``[hidden_size]`` or not on the device of ``x``.
        TypeError: ``x`` has another dtype, or ``weight`` or ``bias`` not that of ``x``.

    Source: Ba, Kiros & Hinton 2016, eq. 3.
    """
    _check_rows(x)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    return call_differentiable(torch.ops.fastshard.layer_norm.default, x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream, and normalise the sum as :func:`layer_norm`.

    Args:
        x: ``[..., hidden_size]``, the output of the block before; as in :func:`rms_norm`.
        residual: Shape, dtype and device of ``x``; any strides.
        weight: ``[hidden_size]``, dtype and device of ``x``; None means ones.
        bias: ``[hidden_size]``, dtype and device of ``x``; None means zeros.
        eps: Added to the variance, before the square root.

    Returns:
        ``(normed, new_residual)``, both contiguous, of the shape and dtype of ``x``.
        ``new_residual = x + residual``, added in float32 and rounded once; ``normed`` is the norm
        of that rounded sum.

    Raises:
        ValueError: As :func:`layer_norm`; or ``residual`` has not the shape or device of ``x``.
        TypeError: As :func:`layer_norm`; or ``residual`` has not the dtype of ``x``.

    Source: Ba, Kiros & Hinton 2016, eq. 3.
    """
    _check_rows(x)
    check_like("residual", residual, x)
    check_shape("residual", residual, x.shape)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    return call_differentiable(
        torch.ops.fastshard.add_layer_norm.default, x, residual, weight, bias, eps
    )


def _check_rows(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] * x.element_size() % 16:
        raise ValueError(f"x must have rows of a multiple of 16 bytes, got shape {list(x.shape)}")
    if x.shape[-1] * x.element_size() > MAX_ROW_BYTES:
        raise ValueError(
            f"x must have rows of at most {MAX_ROW_BYTES} bytes, "
            f"got {x.shape[-1]} elements of {x.element_size()} bytes"
        )


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is not None:
        check_like(name, vector, x)
        check_shape(name, vector, x.shape[-1:])


_norm_gradients.register()


# Outputs are contiguous, as the kernels write them, whatever the strides of x.
@torch.library.register_fake("fastshard::rms_norm")
@torch.library.register_fake("fastshard::layer_norm")
def _(x: Tensor, *rest) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastshard::add_rms_norm")
@torch.library.register_fake("fastshard::add_layer_norm")
def _(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool, variant: str = "auto"
) -> Tensor:
    x32 = x.float()
    x_hat = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    if weight_in_fp32:
        return (x_hat * weight.float()).to(x.dtype).contiguous()
    return (x_hat.to(x.dtype) * weight).contiguous()


torch.library.impl("fastshard::rms_norm", "cpu", _rms_norm_reference)


@torch.library.impl("fastshard::add_rms_norm", "cpu")
def _(x: Tensor, residual: Tensor, *rest) -> tuple[Tensor, Tensor]:
    new_residual = _add_reference(x, residual)
    return _rms_norm_reference(new_residual, *rest), new_residual


def _layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variant: str = "auto"
) -> Tensor:
    x32 = x.float()
    centred = x32 - x32.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous()


torch.library.impl("fastshard::layer_norm", "cpu", _layer_norm_reference)


@torch.library.impl("fastshard::add_layer_norm", "cpu")
def _(x: Tensor, residual: Tensor, *rest) -> tuple[Tensor, Tensor]:
    new_residual = _add_reference(x, residual)
    return _layer_norm_reference(new_residual, *rest), new_residual


def _add_reference(x: Tensor, residual: Tensor) -> Tensor:
    return (x.float() + residual.float()).to(x.dtype).contiguous()


def _norm_cost(x: Tensor, num_tensors: int, vectors: tuple[Tensor | None, ...], flops: int) -> Cost:
    """``num_tensors`` tensors of the size of ``x``, each vector once, ``flops`` an element."""
    num_elements = num_tensors * x.numel() + sum(v.numel() for v in vectors if v is not None)
    return Cost(bytes=num_elements * x.element_size(), flops=flops * x.numel())


@cost("rms_norm")
def _(x: Tensor, weight: Tensor, *rest) -> Cost:
    return _norm_cost(x, 2, (weight,), flops=4)


@cost("add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, *rest) -> Cost:
    return _norm_cost(x, 4, (weight,), flops=5)


@cost("layer_norm")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest) -> Cost:
    return _norm_cost(x, 2, (weight, bias), flops=7)


@cost("add_layer_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *rest) -> Cost:
    return _norm_cost(x, 4, (weight, bias), flops=8)
