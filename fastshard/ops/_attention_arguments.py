"""The arguments of the attention ops: the checks, and the rules as the raw ops take them."""

import math

import torch
from torch import Tensor

from fastshard.ops._checks import DTYPES, check_floating
from fastshard.ops._rope_arguments import check_rope_table, per_token

MAX_HEAD_DIM = 256


def check_qkv(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    """Raise unless q, and k and v as ``[b, s_kv, num_kv_heads, head_dim]``, fit each other."""
    shape, dtype, kv_shape = q.shape, q.dtype, k.shape
    if dtype not in DTYPES:
        check_floating("q", q)
    if dtype == torch.float32 and q.is_cuda:
        raise TypeError("q must be float16 or bfloat16 on CUDA, got torch.float32")
    if len(shape) != 4:
        raise ValueError(f"q must be [b, s_q, num_qo_heads, head_dim], got shape {list(shape)}")
    b, _, num_qo_heads, head_dim = shape
    if head_dim == 0 or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"q must have a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    device = q.device
    if not (  # all at once; one by one only for the error
        (k.dtype == dtype and v.dtype == dtype and k.device == device and v.device == device)
        and (len(kv_shape) == 4 and v.shape == kv_shape)
        and (kv_shape[0] == b and kv_shape[3] == head_dim)
    ):
        _check_kv(q, k, v, k_name, v_name)
    num_kv_heads = kv_shape[2]
    if num_kv_heads == 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"q must have a multiple of {k_name}'s {num_kv_heads} heads, got {num_qo_heads} heads"
        )


def _check_kv(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    b, _, _, head_dim = q.shape
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
        if tensor.dim() != 4 or tensor.shape[0] != b or tensor.shape[3] != head_dim:
            raise ValueError(
                f"{name} must have 4 dimensions, the batch {b} and the head_dim {head_dim} of q, "
                f"got shape {list(tensor.shape)}"
            )
    if v.shape != k.shape:
        raise ValueError(f"{v_name} must have the shape of {k_name}, got {_differing(v, k)}")


def _differing(v: Tensor, k: Tensor) -> str:
    names = ("batch", "length", "num_kv_heads", "head_dim")
    pairs = zip(names, v.shape, k.shape, strict=True)
    return ", ".join(f"{name} {a} for {b}" for name, a, b in pairs if a != b)


def cached_keys_and_values(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """q's rows of both caches, as ``[b, S_max, num_kv_heads, head_dim]``."""
    q_shape, k_shape, v_shape = q.shape, k_cache.shape, v_cache.shape
    if not (len(q_shape) == 4 and len(k_shape) == 4 and len(v_shape) == 4) or not (
        k_shape[0] >= q_shape[0] and v_shape[0] >= q_shape[0]
    ):
        is_wrong = len(q_shape) != 4 or len(k_shape) != 4 or k_shape[0] < q_shape[0]
        name, shape = ("k_cache", k_shape) if is_wrong else ("v_cache", v_shape)
        raise ValueError(
            f"{name} must be [B, num_kv_heads, S_max, head_dim], B at least the batch of q, "
            f"got {list(shape)} for q {list(q_shape)}"
        )
    b = q_shape[0]
    if k_shape[0] != b or v_shape[0] != b:  # a view less costs a microsecond less
        k_cache, v_cache = k_cache[:b], v_cache[:b]
    return k_cache.transpose(1, 2), v_cache.transpose(1, 2)


def check_vector(name: str, vector: Tensor, size: int, q: Tensor) -> None:
    """Raise unless ``vector`` is ``[size]``, on the device of ``q``."""
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(vector.shape)}")
    if vector.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {vector.device}")


def checked_rules(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    kv_lengths: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float | None,
    rope_table: Tensor | None,
    rope_positions: Tensor | None,
) -> tuple[float, Tensor | None]:
    """``softmax_scale`` and ``rope_positions`` as the raw ops take them.

    Raises:
        ValueError: a rule does not hold, which the error names.
        TypeError: a dtype is wrong.
    """
    shape = q.shape
    if kv_lengths is not None:
        _check_indices("kv_lengths", kv_lengths, shape[0], q)
    if first_key is not None:
        _check_indices("first_key", first_key, shape[0], q)
    if mask is not None:
        _check_mask(q, k, mask, causal, kv_lengths)
    if window is not None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not causal:
            raise ValueError(f"window must be None without the causal rule, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(shape[3])
    elif not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    if rope_table is None and rope_positions is None:
        return softmax_scale, None
    if rope_table is None or rope_positions is None:
        raise ValueError("rope_table and rope_positions must be given together")
    check_rope_table("rope_table", rope_table, q)
    rope_positions = per_token("rope_positions", rope_positions, q)
    return softmax_scale, rope_positions


def _check_indices(name: str, indices: Tensor, b: int, q: Tensor) -> None:
    dtype = indices.dtype
    if dtype != torch.int64 and dtype != torch.int32:
        raise TypeError(f"{name} must be int32 or int64, got {dtype}")
    if indices.shape != (b,) or indices.device != q.device:
        check_vector(name, indices, b, q)


def _check_mask(
    q: Tensor, k: Tensor, mask: Tensor, causal: bool, kv_lengths: Tensor | None
) -> None:
    shape, (b, s_q, _, _), s_kv = mask.shape, q.shape, k.shape[1]
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask must be bool or floating, got {mask.dtype}")
    if len(shape) != 3 or shape[0] not in (1, b) or shape[1] != s_q:
        raise ValueError(f"mask must be [1 or {b}, {s_q}, S], got shape {list(shape)}")
    if kv_lengths is None and shape[2] < s_kv:
        raise ValueError(f"mask must cover all {s_kv} keys, got shape {list(shape)}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on {q.device} like q, got {mask.device}")
    if causal:
        raise ValueError("causal must be False where a mask is given, which replaces it, got True")
