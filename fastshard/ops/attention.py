"""Attention ops: schemas, checks, public functions, fake kernels, CPU reference, costs.

CUDA kernels: csrc/attention, bound in csrc/ops/attention.cpp. The CPU reference is the
specification: float32 throughout, rounded once at the end.
"""

import math

import torch
from torch import Tensor

from fastshard.ops._attention_arguments import MAX_HEAD_DIM as MAX_HEAD_DIM
from fastshard.ops._attention_arguments import (
    cached_keys_and_values,
    check_qkv,
    check_vector,
    checked_rules,
)
from fastshard.ops._autograd import inference_only, refuse_gradients
from fastshard.ops._library import COSTS, Cost, cost, define

ROTATING_ROWS = 17
"""Query rows for each key/value head from which on the kernel itself rotates queries."""
REFERENCE_SCORES = 1 << 22
"""Scores that the CPU reference holds at a time: it walks over blocks of queries."""

_RULES = (
    "Tensor? mask, bool causal, Tensor? kv_lengths, Tensor? first_key, int? window, "
    "float? softcap, float softmax_scale, Tensor? rope_table, Tensor? rope_positions, "
    "bool rope_interleaved"
)
define(f"attention(Tensor q, Tensor k, Tensor v, {_RULES}, str variant='auto') -> Tensor")
define(
    "attention_layer_norm(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, float eps, "
    f"{_RULES}) -> Tensor"
)
_DIFFERENTIABLE = "torch.nn.functional.scaled_dot_product_attention"
inference_only("attention", _DIFFERENTIABLE)
inference_only("attention_layer_norm", f"{_DIFFERENTIABLE} and torch.nn.functional.layer_norm")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    kv_lengths: Tensor | None = None,
    first_key: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    rope_table: Tensor | None = None,
    rope_positions: Tensor | None = None,
    rope_interleaved: bool = False,
) -> Tensor:
    """Compute softmax(q k^T * softmax_scale) v over the keys that each query may attend to.

    Query head ``i`` attends to key/value head ``i // (num_qo_heads // num_kv_heads)``. Query ``i``
    of a row stands at key index ``kv_length - s_q + i``: the causal rule is aligned bottom right. A
    query with nothing to attend to gives zeros. What lies in ``k`` and ``v`` outside
    ``first_key..kv_lengths`` has no influence, NaN included.

    Args:
        q: ``[b, s_q, num_qo_heads, head_dim]``, head_dim a multiple of 8 up to 256; float16,
            bfloat16, or float32 (not on CUDA). Any strides here and in ``k`` and ``v``; a last
            stride other than 1 or rows that are not 16-byte aligned cost a copy.
        k: ``[b, s_kv, num_kv_heads, head_dim]``, dtype of ``q``.
        v: Shape and dtype of ``k``.
        mask: ``[b | 1, s_q, S]``; bool, True = attend, or floating, added to the scores (read as
            float32). It replaces the causal rule. S is at least s_kv; with ``kv_lengths`` it may be
            less, and keys from S on are not attended to.
        causal: Attend to no key after the query's own. Not with ``mask``.
        kv_lengths: ``[b]`` int32 or int64, how many keys are valid; by default all s_kv, which is
            also the most.
        first_key: ``[b]`` int32 or int64, keys before it (left padding) are not attended to.
        window: Attend to the last ``window`` keys only, the query's own included. Needs ``causal``.
        softcap: ``c``: scores become ``c * tanh(score / c)``, before the mask.
        softmax_scale: By default ``1 / sqrt(head_dim)``.
        rope_table: As ``table`` of :func:`apply_rope`: queries are rotated first, in the kernel
            where they are many, with the same result as by that function. Keys are not: they are
            rotated where they are made.
        rope_positions: ``[b, s_q]`` or ``[s_q]``, int64: rows of ``rope_table``. A query whose
            position lies outside the table gives NaN.
        rope_interleaved: As ``interleaved`` of :func:`apply_rope`.

    Returns:
        ``[b, s_q, num_qo_heads, head_dim]``, contiguous, dtype of ``q``.

    Raises:
        ValueError: A shape, a device or a number breaks one of the rules above, or only one of
            ``rope_table`` and ``rope_positions`` is given.
        TypeError: A dtype does.
        RuntimeError: A gradient is asked for, which this op has not.

    Source: Dao 2023, FlashAttention-2, algorithm 1.
    """
    check_qkv(q, k, v, "k", "v")
    if torch.is_grad_enabled():
        refuse_gradients("attention", q=q, k=k, v=v, mask=mask, rope_table=rope_table)
    # Written out, here and below: packing the rules into a tuple costs half a microsecond a call.
    softmax_scale, rope_positions = checked_rules(
        q,
        k,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
    )
    return torch.ops.fastshard.attention.default(
        q,
        k,
        v,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
        rope_interleaved,
    )


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    *,
    mask: Tensor | None = None,
    first_key: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    rope_table: Tensor | None = None,
    rope_positions: Tensor | None = None,
    rope_interleaved: bool = False,
) -> Tensor:
    """Attend from the newest ``s_q`` tokens to a cache that already holds their keys and values.

    Causal by cache slot: query ``i`` sees slots up to ``kv_lengths - s_q + i``, unless ``mask``
    replaces that rule. Keywords, result and errors as in :func:`attention`.

    Args:
        q: ``[b, s_q, num_qo_heads, head_dim]``.
        k_cache: ``[B, num_kv_heads, S_max, head_dim]``, B >= b; row ``i`` of q reads row ``i``.
        v_cache: Shape and dtype of ``k_cache``.
        kv_lengths: ``[b]`` int32 or int64, slots in use, those of q's own tokens included.
        mask: ``[b | 1, s_q, S]``; slots from S on are not attended to. Not with ``window``.

    Returns:
        ``[b, s_q, num_qo_heads, head_dim]``, contiguous, dtype of ``q``.
    """
    k, v = cached_keys_and_values(q, k_cache, v_cache)
    check_qkv(q, k, v, "k_cache", "v_cache")
    if torch.is_grad_enabled():
        tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "mask": mask}
        refuse_gradients("attention", "cached_attention", **tensors, rope_table=rope_table)
    causal = mask is None
    softmax_scale, rope_positions = checked_rules(
        q,
        k,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
    )
    return torch.ops.fastshard.attention.default(
        q,
        k,
        v,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
        rope_interleaved,
    )


def attention_layer_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    kv_lengths: Tensor | None = None,
    first_key: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    rope_table: Tensor | None = None,
    rope_positions: Tensor | None = None,
    rope_interleaved: bool = False,
) -> Tensor:
    """Attend, then normalise each head's output over head_dim, in one pass and rounded once.

    Keywords, result and errors as in :func:`attention`; a query with nothing to attend to gives
    ``bias``, the LayerNorm of zeros.

    Args:
        q: ``[b, s_q, num_qo_heads, head_dim]``.
        k: ``[b, s_kv, num_kv_heads, head_dim]``.
        v: Shape of ``k``.
        weight: ``[head_dim]``, dtype of ``q``; by default ones.
        bias: ``[head_dim]``, dtype of ``q``; by default zeros.
        eps: Added to the variance, before the square root.

    Returns:
        ``[b, s_q, num_qo_heads, head_dim]``, contiguous, dtype of ``q``.

    Source: as :func:`attention`; Ba, Kiros & Hinton 2016, section 3, over head_dim.
    """
    check_qkv(q, k, v, "k", "v")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype}, got {vector.dtype}")
        check_vector(name, vector, q.shape[-1], q)
    if torch.is_grad_enabled():
        tensors = {"q": q, "k": k, "v": v, "weight": weight, "bias": bias, "mask": mask}
        refuse_gradients("attention_layer_norm", **tensors, rope_table=rope_table)
    softmax_scale, rope_positions = checked_rules(
        q,
        k,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
    )
    return torch.ops.fastshard.attention_layer_norm.default(
        q,
        k,
        v,
        weight,
        bias,
        eps,
        mask,
        causal,
        kv_lengths,
        first_key,
        window,
        softcap,
        softmax_scale,
        rope_table,
        rope_positions,
        rope_interleaved,
    )


@torch.library.register_fake("fastshard::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rules) -> Tensor:
    return q.new_empty(q.shape)  # contiguous, as the kernel writes it


@torch.library.register_fake("fastshard::attention_layer_norm")
def _(q: Tensor, k: Tensor, v: Tensor, weight, bias, eps: float, *rules) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.impl("fastshard::attention", "cpu")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kv_lengths: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    rope_table: Tensor | None,
    rope_positions: Tensor | None,
    rope_interleaved: bool,
    variant: str = "auto",
) -> Tensor:
    rules = (mask, causal, kv_lengths, first_key, window, softcap, softmax_scale)
    rope = (rope_table, rope_positions, rope_interleaved)
    return _reference(q, k, v, *rules, *rope).to(q.dtype)


@torch.library.impl("fastshard::attention_layer_norm", "cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *rules
) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    out = _reference(q, k, v, *rules)
    return torch.nn.functional.layer_norm(out, (q.shape[-1],), weight, bias, eps).to(q.dtype)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kv_lengths: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    rope_table: Tensor | None,
    rope_positions: Tensor | None,
    rope_interleaved: bool,
) -> Tensor:
    """Attention in float32, ``[b, s_q, num_qo_heads, head_dim]``, block by block of queries."""
    if rope_table is not None:
        q = torch.ops.fastshard.apply_rope.default(q, rope_table, rope_positions, rope_interleaved)
    b, s_q, num_qo_heads = q.shape[:3]
    s_kv, num_kv_heads = k.shape[1:3]
    out = q.new_zeros(q.shape, dtype=torch.float32)
    lengths = torch.full((b,), s_kv) if kv_lengths is None else kv_lengths.long().clamp(0, s_kv)
    if out.numel() == 0:
        return out
    num_keys = int(lengths.max())  # on the CPU reading a length costs nothing
    if mask is not None:
        num_keys = min(num_keys, mask.shape[2])
    if num_keys == 0:
        return out
    keys = torch.arange(num_keys)
    first = torch.zeros(b, dtype=torch.long) if first_key is None else first_key.long()
    valid = (keys >= first[:, None]) & (keys < lengths[:, None])  # [b, num_keys]

    k32 = k[:, :num_keys].transpose(1, 2).float()  # [b, num_kv_heads, num_keys, head_dim]
    v32 = v[:, :num_keys].transpose(1, 2).float()
    if not valid.all():
        v32 = v32.masked_fill(~valid[:, None, :, None], 0)  # a weight of 0 does not silence a NaN

    block = max(1, REFERENCE_SCORES // (b * num_qo_heads * num_keys))
    for start in range(0, s_q, block):
        q32 = q[:, start : start + block].float()
        q32 = q32.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        scores = q32.flatten(2, 3) @ k32.transpose(2, 3) * softmax_scale
        scores = scores.unflatten(2, q32.shape[2:4])  # [b, num_kv_heads, group, block, num_keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)

        visible = valid[:, None, :]  # [b, 1 | block, num_keys]
        if causal:
            index = lengths[:, None] - s_q + torch.arange(start, start + q32.shape[3])
            visible = visible & (keys <= index[:, :, None])
            if window is not None:
                visible = visible & (keys > index[:, :, None] - window)
        if mask is not None:
            rows = mask[:, start : start + block, :num_keys]
            if mask.dtype == torch.bool:
                visible = visible & rows
            else:
                scores = scores + rows.float()[:, None, None]
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)

        nothing = scores.amax(-1, keepdim=True) == -math.inf
        weights = torch.softmax(scores, dim=-1).masked_fill(nothing, 0)
        heads = (weights.flatten(2, 3) @ v32).unflatten(2, q32.shape[2:4])
        out[:, start : start + block] = heads.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


@cost("attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kv_lengths: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    rope_table: Tensor | None = None,
    rope_positions: Tensor | None = None,
    rope_interleaved: bool = False,
    variant: str = "auto",
) -> Cost:
    s_q, s_kv = q.shape[1], k.shape[1]
    pairs = s_q * s_kv
    if causal:
        ends = range(s_kv - s_q + 1, s_kv + 1)
        pairs = sum(min(max(end, 0), window or s_kv) for end in ends)
    size = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    if mask is not None:
        size += mask.numel() * mask.element_size()
    flops = 4 * q.shape[0] * q.shape[2] * q.shape[3] * pairs
    if rope_table is not None:
        size += rope_positions.numel() * (8 + rope_table.shape[1] * 8)
        flops += q.shape[0] * s_q * q.shape[2] * rope_table.shape[1] * 6
    return Cost(bytes=size, flops=flops)


@cost("attention_layer_norm")
def _(q, k, v, weight, bias, eps, *rules) -> Cost:
    base = COSTS["attention"](q, k, v, *rules)
    size = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    return Cost(bytes=base.bytes + size, flops=base.flops + 8 * q.numel())
