"""Our own ops as peers of a kernel: where one computes what the archive's op does."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastshard.ops import layer_norm, rms_norm


def ours(kind: str | None, arguments: Sequence[object]) -> Callable[..., object] | str:
    """The function that answers to the same arguments, or why there is none.

    Args:
        kind: Of ``catalog.KINDS`` by name.
        arguments: Of the kernel.
    """
    peer = {"rmsnorm": _rms_norm, "layernorm": _layer_norm}.get(kind)
    if peer is None:
        return "no op of fastshard computes this alone"
    x = arguments[0]
    if not isinstance(x, Tensor):
        return "our op does not take these arguments: the first is no tensor"
    if x.is_cuda and x.dtype == torch.float32:
        return "our op is for float16 and bfloat16 on a GPU"
    try:
        function = peer(arguments)
        function(*arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"our op does not take these arguments: {' '.join(str(error).split())[:150]}"
    return function


def _rms_norm(arguments: Sequence[object]) -> Callable[..., object]:
    """Of the archive's ``x / sqrt(mean(x^2, dim=1) + eps)``, without a weight."""
    x = arguments[0]
    if len(arguments) != 2 or x.ndim != 2:
        raise ValueError("dimension 1 is not the last")
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return lambda x, eps: rms_norm(x, weight, eps=eps)


def _layer_norm(arguments: Sequence[object]) -> Callable[..., object]:
    """Of ``F.layer_norm`` over the dimensions of the weight, which are the last."""
    if len([a for a in arguments if isinstance(a, Tensor)]) != 3:
        raise ValueError("the tensors are not x, weight and bias")
    eps = next((a for a in arguments if isinstance(a, float)), 1e-5)

    def function(*arguments: object) -> Tensor:
        x, weight, bias = (a for a in arguments if isinstance(a, Tensor))
        rows = x.reshape(*x.shape[: x.ndim - weight.ndim], weight.numel())
        return layer_norm(rows, weight.view(-1), bias.view(-1), eps=eps).view(x.shape)

    return function
