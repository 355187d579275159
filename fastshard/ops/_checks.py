"""Argument checks that several op families share: plain if/raise, which traces under fullgraph.

They run on every call and must cost little. Where several tensors obey the same rules, a public
function first asks whether all do, and only if not goes through them one by one for the error.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is float32, float16 or bfloat16."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` has ``dtype``."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has exactly ``shape``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless ``tensor`` has the dtype (TypeError) and device (ValueError) of ``like``."""
    check_dtype(name, tensor, like.dtype)
    check_device(name, tensor, like.device)
