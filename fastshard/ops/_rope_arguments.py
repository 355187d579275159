"""The arguments of the rope ops, and of attention where it rotates: the checks.

Several tensors of the same rules are first asked all at once, and one by one only for the error.
"""

import torch
from torch import Tensor

from fastshard.ops._checks import (
    DTYPES,
    check_device,
    check_dtype,
    check_floating,
    check_like,
    check_shape,
)


def check_heads(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is ``[b, s, num_heads, head_dim]`` with unit last stride."""
    if x.dtype not in DTYPES:
        check_floating(name, x)
    if x.dim() != 4 or x.stride()[3] != 1:
        raise ValueError(
            f"{name} must be [batch, seq_len, num_heads, head_dim] with unit last stride, "
            f"got shape {list(x.shape)} and strides {list(x.stride())}"
        )


def check_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, overflow: Tensor
) -> None:
    """Raise unless k and v fit q, both caches fit k, and ``overflow`` is a flag."""
    check_heads("q", q)
    shape, dtype, device, kv_shape, cache_shape = q.shape, q.dtype, q.device, k.shape, k_cache.shape
    if not (
        (k.dtype == dtype and v.dtype == dtype and k.device == device and v.device == device)
        and (len(kv_shape) == 4 and v.shape == kv_shape)
        and (kv_shape[:2] == shape[:2] and kv_shape[3] == shape[3])
        and (k.stride()[3] == 1 and v.stride()[3] == 1)
    ):
        _check_kv(q, k, v)
    if not (
        (k_cache.dtype == dtype and v_cache.dtype == dtype)
        and (k_cache.device == device and v_cache.device == device)
        and (v_cache.shape == cache_shape and len(cache_shape) == 4)
        and (cache_shape[0] >= shape[0] and cache_shape[1] == kv_shape[2])
        and (cache_shape[3] == shape[3] and k_cache.stride()[3] == 1 and v_cache.stride()[3] == 1)
    ):
        _check_caches(q, k, k_cache, v_cache)
    if overflow.dtype != torch.int32 or overflow.device != device or overflow.shape != (1,):
        check_dtype("overflow", overflow, torch.int32)
        check_device("overflow", overflow, device)
        check_shape("overflow", overflow, (1,))


def _check_kv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("k", k), ("v", v)):
        check_heads(name, tensor)
        check_like(name, tensor, q)
        check_shape(name, tensor, (*q.shape[:2], k.shape[2], q.shape[3]))


def _check_caches(q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    b = q.shape[0]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_like(name, cache, q)
        if cache.dim() != 4 or cache.stride(3) != 1:
            raise ValueError(
                f"{name} must be [batch, num_kv_heads, max_seq_len, head_dim] with unit last "
                f"stride, got shape {list(cache.shape)} and strides {list(cache.stride())}"
            )
        if cache.shape[0] < b:
            raise ValueError(
                f"{name} must hold at least the {b} rows of q's batch, got {cache.shape[0]}"
            )
        check_shape(name, cache, (k_cache.shape[0], k.shape[2], k_cache.shape[2], q.shape[3]))


def check_rope_table(name: str, table: Tensor, x: Tensor) -> None:
    """Raise unless ``table`` rotates heads of ``x``, ``[..., head_dim]``."""
    if table.dtype != torch.float32 or table.device != x.device:
        check_dtype(name, table, torch.float32)
        check_device(name, table, x.device)
    shape = table.shape
    if len(shape) != 3 or shape[2] != 2 or not table.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous [max_positions, rotary_dim // 2, 2], "
            f"got shape {list(shape)} and strides {list(table.stride())}"
        )
    if 2 * shape[1] > x.shape[3]:
        raise ValueError(
            f"{name} must rotate at most head_dim = {x.shape[3]} elements, "
            f"got rotary_dim {2 * shape[1]}"
        )


def per_token(name: str, index: Tensor, x: Tensor) -> Tensor:
    """A ``[b, s]`` view of an index tensor that may be ``[s]``."""
    if index.dtype != torch.int64 or index.device != x.device:
        check_dtype(name, index, torch.int64)
        check_device(name, index, x.device)
    b, s, _, _ = x.shape
    shape = index.shape
    if shape == (b, s):
        return index
    if shape != (s,):
        raise ValueError(f"{name} must have shape [{b}, {s}] or [{s}], got {list(shape)}")
    return index.expand(b, s)
