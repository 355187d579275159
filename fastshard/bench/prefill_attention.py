"""The attention of ``bench prefill``: all tokens of a prompt at once."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastshard import ops
from fastshard.bench.attention import BACKENDS
from fastshard.bench.case import Bench, Call, Case, Unavailable, Variant

RULES = ("causal", "full", "mask")
"""Causal; every key; a dense boolean mask, which leaves no tile out: as many tiles as "full"."""
CHECKED_ROWS = 128  # of the queries, spread over the prompt, compared with float64


def case(
    bench: Bench,
    shape: str,
    rule: str,
    batch: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Case:
    """Attention of ``num_tokens`` queries to as many keys, beside PyTorch's.

    Raises:
        ValueError: ``rule`` is not one of ``RULES``.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    heads = num_heads + 2 * num_kv_heads
    num_bytes = batch * num_tokens * (heads + num_heads) * head_dim * bench.settings.dtype.itemsize
    sets, make_run = bench.cold_graphs(num_bytes)
    qkv = bench.randn(sets, batch, num_tokens, heads, head_dim)  # as one product gives them
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=3)
    mask = None
    if rule == "mask":
        mask = torch.rand(1, num_tokens, num_tokens, device=bench.device) < 0.5
    is_causal = rule == "causal"
    rules = (mask, is_causal, None, None, None, None, 0.0)
    cost = ops.COSTS["attention"](q[0], k[0], v[0], *rules)
    rows = torch.arange(0, num_tokens, -(-num_tokens // CHECKED_ROWS), device=bench.device)

    def ours(i: int, kv_lengths: Tensor | None = None) -> Tensor:
        return ops.attention(q[i], k[i], v[i], mask=mask, causal=is_causal, kv_lengths=kv_lengths)

    peers = {name: partial(_sdpa, name, q, k, v, mask, is_causal) for name in BACKENDS}
    if mask is not None:
        del peers["flash"]  # takes none
    asked = bench.settings.peers
    variants = [Variant("fastshard", lambda: ours, is_peer=False)]
    if mask is None:
        # The same work by our kernel, also where the op leaves it to PyTorch.
        lengths = torch.full((batch,), num_tokens, device=bench.device)
        variants.append(
            Variant("fastshard kernel", lambda: partial(ours, kv_lengths=lengths), is_peer=False)
        )
    if "sdpa" in asked:
        variants += [Variant(f"sdpa {name}", peers[name]) for name in peers]
    if "compile" in asked:
        variants.append(Variant("torch flex", partial(_flex, bench, q, k, v, mask, is_causal)))
    return Case(
        name="prefill",
        shape=shape,
        dtype=bench.settings.dtype,
        num_bytes=cost.bytes,
        flops=cost.flops,
        golden=lambda: golden(q[0], k[0], v[0], mask, is_causal, rows),
        variants=variants,
        make_run=make_run,
        baseline="sdpa math",
        compared=lambda out: out[:, rows],
        limit="mma",
    )


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Call:
    """PyTorch's backend; of one that knows no groups, keys and values are repeated beforehand."""
    is_grouped = q.shape[3] != k.shape[3] and name != "efficient"
    if name == "efficient":
        group = q.shape[3] // k.shape[3]
        k, v = (tensor.repeat_interleave(group, dim=3) for tensor in (k, v))

    def call(i: int) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return F.scaled_dot_product_attention(
                *(tensor[i].transpose(1, 2) for tensor in (q, k, v)),
                attn_mask=None if mask is None else mask[:, None],
                is_causal=is_causal,
                enable_gqa=is_grouped,
            ).transpose(1, 2)

    return call


def _flex(
    bench: Bench, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> Call:
    """FlexAttention, compiled."""
    if bench.device.type != "cuda":
        raise Unavailable("FlexAttention is compiled for a GPU")
    function = bench.compiled(flex_attention)
    return flex_call(function, q, k, v, mask, is_causal)


def flex_call(
    function: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
) -> Call:
    """A call of ``flex_attention``, compiled or not, on the inputs of an index."""
    size = q.shape[2]
    block_mask = None
    if is_causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i, None, None, size, size, device=q.device
        )
    elif mask is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: mask[0, i, j], None, None, size, size, device=q.device
        )

    def call(i: int) -> Tensor:
        tensors = (tensor[i].transpose(1, 2) for tensor in (q, k, v))
        return function(*tensors, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return call


def golden(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, rows: Tensor
) -> Tensor:
    """Queries ``rows`` of ``q``, ``[b, s, num_heads, d]``, in float64: ``[b, rows, num_heads, d]``.

    Args:
        q: Queries of the whole prompt.
        k: ``[b, s, num_kv_heads, d]``.
        v: As ``k``.
        mask: ``[1, s, s]`` bool, True = attend, or None.
        is_causal: Whether a query sees no key after its own.
        rows: int64, queries that are computed.
    """
    grouped = q[:, rows].double().unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    keys, values = (tensor.double().permute(0, 2, 1, 3)[:, :, None] for tensor in (k, v))
    scores = grouped @ keys.mT / q.shape[-1] ** 0.5  # [b, num_kv_heads, group, rows, s]
    if is_causal:
        hidden = torch.arange(k.shape[1], device=k.device) > rows[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[0, rows], -torch.inf)
    out = scores.softmax(-1) @ values
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)
