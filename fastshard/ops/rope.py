"""Rotary position embedding, alone and fused with the append of k and v to the cache.

CUDA kernel: csrc/rope, bound in csrc/ops/rope.cpp. The CPU reference is the specification.
"""

import torch
from torch import Tensor

from fastshard.ops._autograd import call_differentiable, inference_only, refuse_gradients
from fastshard.ops._library import Cost, cost, define
from fastshard.ops._rope_arguments import check_append, check_heads, check_rope_table, per_token

define("apply_rope(Tensor x, Tensor table, Tensor positions, bool interleaved) -> Tensor")
define(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor positions,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!) overflow,"
    " bool interleaved) -> Tensor"
)
inference_only("rope_append", "fastshard.ops.apply_rope and torch.cat")


def apply_rope(x: Tensor, table: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate each head of ``x`` by the angles of its position.

    Args:
        x: ``[b, s, num_heads, head_dim]``, float32, float16 or bfloat16; any strides, the last 1.
        table: ``[max_positions, rotary_dim // 2, 2]``, float32, contiguous: cosine and sine.
            ``rotary_dim <= head_dim``; elements from ``rotary_dim`` on pass through.
        positions: ``[b, s]`` or ``[s]``, int64: rows of ``table``.
        interleaved: Rotate the pairs ``(2i, 2i + 1)``, as torchtune's Llama; else ``(i, i +
            rotary_dim // 2)``, as Hugging Face.

    Returns:
        ``[b, s, num_heads, head_dim]``, contiguous, dtype of ``x``. Computed in float32, rounded
        once. A token whose position lies outside the table comes out as NaN: positions stay on
        the device, where nothing can be raised.

    Raises:
        ValueError: A shape, stride or device is not as above.
        TypeError: A dtype is not as above.
        RuntimeError: A gradient of ``table`` is asked for; only that of ``x`` exists.

    Source: Su et al. 2021 (RoFormer), eq. 34.
    """
    check_heads("x", x)
    check_rope_table("table", table, x)
    positions = per_token("positions", positions, x)
    if torch.is_grad_enabled() and table.requires_grad:
        raise RuntimeError("table must not require grad: apply_rope has a gradient of x alone")
    op = torch.ops.fastshard.apply_rope.default
    return call_differentiable(op, x, table, positions, interleaved)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    overflow: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """Rotate q and k, and write k and v into the cache: updates both caches and ``overflow``.

    Token ``j`` of batch row ``i`` goes to ``cache[i, :, slots[i, j], :]``; two tokens of one row
    must not share a slot. A token whose slot lies outside the cache, or whose position lies
    outside the table, is not written, its q is zeros, and ``overflow[0]`` becomes 1: indices stay
    on the device, so the host looks at the flag when it next reads from there.

    Args:
        q: ``[b, s, num_qo_heads, head_dim]``, float32, float16 or bfloat16; any strides, the last
            1 (so q, k and v may be slices of one packed projection).
        k: ``[b, s, num_kv_heads, head_dim]``, dtype and device of ``q``; any strides, the last 1.
        v: As ``k``.
        table: As in :func:`apply_rope`; None appends without rotation and ignores ``positions``.
        positions: ``[b, s]`` or ``[s]``, int64: rows of ``table``.
        k_cache: ``[B, num_kv_heads, max_seq_len, head_dim]``, ``B >= b``, dtype and device of
            ``q``; any strides, the last 1. Written in place.
        v_cache: As ``k_cache``. Written in place.
        slots: ``[b, s]`` or ``[s]``, int64: rows of the caches.
        overflow: ``[1]``, int32: set to 1 where a token was out of range, else left alone.
        interleaved: As in :func:`apply_rope`.

    Returns:
        The rotated q: ``[b, s, num_qo_heads, head_dim]``, contiguous, dtype of ``q``.

    Raises:
        ValueError: A shape, stride or device is not as above.
        TypeError: A dtype is not as above.
        RuntimeError: A gradient is asked for, which this op has not.

    Source: Su et al. 2021 (RoFormer), eq. 34.
    """
    check_append(q, k, v, k_cache, v_cache, overflow)
    if table is not None:
        check_rope_table("table", table, q)
    are_the_same = slots is positions  # as of a prompt without padding
    positions = per_token("positions", positions, q)
    slots = positions if are_the_same else per_token("slots", slots, q)
    if torch.is_grad_enabled():
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        refuse_gradients("rope_append", q=q, k=k, v=v, table=table, **caches)
    return torch.ops.fastshard.rope_append.default(
        q, k, v, table, positions, k_cache, v_cache, slots, overflow, interleaved
    )


@torch.library.register_fake("fastshard::apply_rope")
def _(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


@torch.library.register_fake("fastshard::rope_append")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    overflow: Tensor,
    interleaved: bool,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.impl("fastshard::apply_rope", "cpu")
def _(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    out = _rotate(x, table, positions, interleaved)
    return out.masked_fill_(~_inside(positions, table.shape[0])[:, :, None, None], torch.nan)


@torch.library.impl("fastshard::rope_append", "cpu")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    overflow: Tensor,
    interleaved: bool,
) -> Tensor:
    valid = _inside(slots, k_cache.shape[2])
    if table is None:
        q = q.clone(memory_format=torch.contiguous_format)
    else:
        valid &= _inside(positions, table.shape[0])
        q = _rotate(q, table, positions, interleaved)
        k = _rotate(k, table, positions, interleaved)
    row, token = valid.nonzero(as_tuple=True)
    k_cache[row, :, slots[row, token]] = k[row, token]
    v_cache[row, :, slots[row, token]] = v[row, token]
    if not valid.all():
        overflow.fill_(1)
    return q.masked_fill_(~valid[:, :, None, None], 0)


def _save_rotation(ctx, inputs: tuple, output: Tensor) -> None:
    _, table, positions, ctx.interleaved = inputs
    ctx.save_for_backward(table, positions)


def _rotate_back(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """The transpose of a rotation is the rotation by minus its angle: with minus the sines."""
    table, positions = ctx.saved_tensors
    back = table * table.new_tensor([1, -1])
    op = torch.ops.fastshard.apply_rope.default
    return op(grad, back, positions, ctx.interleaved), None, None, None


torch.library.register_autograd("fastshard::apply_rope", _rotate_back, setup_context=_save_rotation)


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _rotate(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """A rotated contiguous copy of ``x``; any values where a position is outside the table."""
    out = x.clone(memory_format=torch.contiguous_format)
    max_positions, num_pairs, _ = table.shape
    if max_positions == 0 or num_pairs == 0:
        return out
    cos, sin = table[positions.clamp(0, max_positions - 1)][:, :, None].unbind(-1)
    if interleaved:
        first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    else:
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
    x1, x2 = x[..., first].float(), x[..., second].float()
    out[..., first] = (x1 * cos - x2 * sin).to(x.dtype)
    out[..., second] = (x2 * cos + x1 * sin).to(x.dtype)
    return out


@cost("apply_rope")
def _(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Cost:
    row_bytes = table.shape[1] * 8  # each position's row of the table, read once
    return Cost(
        bytes=2 * x.numel() * x.element_size() + positions.numel() * (8 + row_bytes),
        flops=x.numel() // max(x.shape[3], 1) * table.shape[1] * 6,
    )


@cost("rope_append")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    overflow: Tensor,
    interleaved: bool,
) -> Cost:
    num_elements = q.numel() + k.numel() + v.numel()
    num_pairs = 0 if table is None else table.shape[1]
    index_bytes = 8 if table is None else 16 + 8 * num_pairs  # slot, position, row of the table
    return Cost(
        bytes=2 * num_elements * q.element_size() + slots.numel() * index_bytes,
        flops=(q.numel() + k.numel()) // max(q.shape[3], 1) * num_pairs * 6,
    )
