"""Autograd formulas of the norms: plain PyTorch in float32, rounded once, on any device.

``ctx`` keeps the tensor that was normalised: x, or the rounded sum where a residual was added.
"""

import torch
from torch import Tensor


def register() -> None:
    """Give the ops that fastshard/ops/norm.py declares their formulas."""
    for name, backward, save in (
        ("rms_norm", _rms_norm_backward, _save_rms_norm),
        ("add_rms_norm", _add_rms_norm_backward, _save_add_rms_norm),
        ("layer_norm", _layer_norm_backward, _save_layer_norm),
        ("add_layer_norm", _add_layer_norm_backward, _save_add_layer_norm),
    ):
        torch.library.register_autograd(f"fastshard::{name}", backward, setup_context=save)


def _save_rms_norm(ctx, inputs, output) -> None:
    x, weight, ctx.eps, *_ = inputs
    ctx.save_for_backward(x, weight)


def _save_add_rms_norm(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps, *_ = inputs
    ctx.save_for_backward(output[1], weight)


def _save_layer_norm(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _save_add_layer_norm(ctx, inputs, output) -> None:
    _, _, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight)


# A backward returns a gradient, or None, for each argument of its op.
def _rms_norm_backward(ctx, grad: Tensor) -> tuple:
    dx, dweight = _rms_norm_gradients(grad, *ctx.saved_tensors, ctx.eps)
    return dx.to(grad.dtype), dweight.to(grad.dtype), None, None, None


def _add_rms_norm_backward(ctx, grad: Tensor, grad_residual: Tensor) -> tuple:
    dx, dweight = _rms_norm_gradients(grad, *ctx.saved_tensors, ctx.eps)
    dsum = (dx + grad_residual.float()).to(grad.dtype)
    return dsum, dsum, dweight.to(grad.dtype), None, None, None


def _layer_norm_backward(ctx, grad: Tensor) -> tuple:
    dx, dweight = _layer_norm_gradients(grad, *ctx.saved_tensors, ctx.eps)
    dvectors = _vector_gradients(ctx.needs_input_grad[1:3], dweight, grad)
    return dx.to(grad.dtype), *dvectors, None, None


def _add_layer_norm_backward(ctx, grad: Tensor, grad_residual: Tensor) -> tuple:
    dx, dweight = _layer_norm_gradients(grad, *ctx.saved_tensors, ctx.eps)
    dvectors = _vector_gradients(ctx.needs_input_grad[2:4], dweight, grad)
    dsum = (dx + grad_residual.float()).to(grad.dtype)
    return dsum, dsum, *dvectors, None, None


def _rms_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[..., hidden_size]`` and the weight ``[hidden_size]``, float32."""
    grad, x = grad.float(), x.float()
    inv_rms = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    x_hat = x * inv_rms
    dx_hat = grad * weight.float()
    dx = inv_rms * (dx_hat - x_hat * (dx_hat * x_hat).mean(dim=-1, keepdim=True))
    return dx, _sum_of_rows(grad * x_hat)


def _layer_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As ``_rms_norm_gradients``; of a weight of ones where it is None."""
    grad, x = grad.float(), x.float()
    centred = x - x.mean(dim=-1, keepdim=True)
    inv_std = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    x_hat = centred * inv_std
    dx_hat = grad if weight is None else grad * weight.float()
    dx = inv_std * (
        dx_hat
        - dx_hat.mean(dim=-1, keepdim=True)
        - x_hat * (dx_hat * x_hat).mean(dim=-1, keepdim=True)
    )
    return dx, _sum_of_rows(grad * x_hat)


def _vector_gradients(
    needed: tuple[bool, bool], dweight: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of LayerNorm's weight and bias, None for one that is not there."""
    return (
        dweight.to(grad.dtype) if needed[0] else None,
        _sum_of_rows(grad.float()).to(grad.dtype) if needed[1] else None,
    )


def _sum_of_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(dim=0)
