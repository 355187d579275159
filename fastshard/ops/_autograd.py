"""Ops under autograd: a formula, or an error where a gradient would be asked for in vain."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

INFERENCE_ONLY: dict[str, str] = {}
"""Op without an autograd formula -> what to use instead where a gradient is needed."""


def inference_only(op_name: str, instead: str) -> None:
    """Note that ``torch.ops.fastshard.<op_name>`` has no gradient, and what to use instead."""
    INFERENCE_ONLY[op_name] = instead


def refuse_gradients(op_name: str, function: str | None = None, **tensors: Tensor | None) -> None:
    """Raise if an argument of an inference-only op requires a gradient.

    Public functions call it where ``torch.is_grad_enabled()``. The raw ops do not: it would be an
    autograd kernel in Python in front of each call, in compiled graphs too.

    Args:
        op_name: Of ``INFERENCE_ONLY``.
        function: The public function, where it has another name.
        tensors: Its arguments.

    Raises:
        RuntimeError: One requires a gradient, or is a dual tensor of forward-mode autograd.
    """
    is_forward = forward_ad._current_level >= 0
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.requires_grad or (is_forward and _has_tangent(tensor)):
            raise RuntimeError(
                f"{function or op_name} is for inference only and has no gradient, got {name} that "
                "requires grad: call it under torch.no_grad(), "
                f"or use {INFERENCE_ONLY[op_name]}"
            )


def call_differentiable(op: Callable, *arguments: Any) -> Any:
    """Call a raw op that has an autograd formula.

    The formula is a Python kernel in front of the op's own. Without gradients it has nothing to
    do, so an eager call goes around it.

    Raises:
        RuntimeError: An argument is a dual tensor of forward-mode autograd.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
        raise RuntimeError(f"{op} has no formula for forward-mode autograd: use reverse mode")
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as torch.library's own autograd kernel does
        return op(*arguments)


def _has_tangent(argument: Any) -> bool:
    """Whether forward-mode autograd, ``torch.func.jvp`` too, would ask for its derivative."""
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
