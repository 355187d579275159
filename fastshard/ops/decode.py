"""One decode step of a whole shard: embedding, every layer, final norm and head, as one op.

CUDA kernel: csrc/decode, bound in csrc/ops/decode.cpp. The CPU reference, the layers' own ops in
turn, is the specification: it fixes where values are rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastshard.ops._autograd import inference_only, refuse_gradients
from fastshard.ops._decode_arguments import (
    WEIGHT_LISTS,
    DecodeArguments,
    DecodeSizes,
    DecodeWeights,
    check_rank_sums,
    check_state,
    check_weights,
    decode_sizes,
    decode_step_refusal,
)
from fastshard.ops._library import Cost, cost, define
from fastshard.ops.attention import cached_attention
from fastshard.ops.linear import linear
from fastshard.ops.mlp import fused_mlp
from fastshard.ops.norm import rms_norm
from fastshard.ops.rope import rope_append

define(
    "decode_step(Tensor x, Tensor? embedding, Tensor[] sa_norm, Tensor[] qkv_weight, "
    "Tensor[] qkv_bias, Tensor[] q_norm, Tensor[] k_norm, Tensor[] output_weight, "
    "Tensor[] output_bias, Tensor[] mlp_norm, Tensor[] gate_up_weight, Tensor[] down_weight, "
    "Tensor? norm, Tensor? head, Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, Tensor rope_table, "
    "Tensor positions, Tensor slots, Tensor? first_key, Tensor(c!) overflow, "
    "Tensor(d!) workspace, Tensor(e!) out, int num_heads, float norm_eps, bool weight_in_fp32, "
    "bool rope_interleaved, str activation, int[] windows, Tensor(f!)[] rank_sums, int rank) -> ()"
)
inference_only("decode_step", "a model of torch.nn's own modules")


def decode_workspace_size(
    batch: int,
    hidden_size: int,
    intermediate_size: int,
    qkv_rows: int,
    num_heads: int,
    head_dim: int,
) -> int:
    """How many int32 words the workspace of :func:`decode_step` has."""
    activations = 4 * batch * (2 * hidden_size + qkv_rows + intermediate_size)
    squares = 4 * batch * -(-hidden_size // 8)
    residual = 4 * hidden_size  # for any batch
    down_parts = 2 * batch * hidden_size * -(-intermediate_size // 2048)
    attention_parts = 8 * batch * num_heads * (head_dim + 2) * 16
    return 64 + activations + squares + residual + down_parts + attention_parts


def new_decode_workspace(weights: DecodeWeights, batch: int, *, num_heads: int) -> Tensor:
    """Make what :func:`decode_step` keeps between calls: int32 zeros, on the weights' device.

    Its content is the op's own: other weights need another, and so do steps that may overlap, as
    on two streams.
    """
    sizes = decode_sizes(weights, num_heads)
    size = _workspace_size(batch, num_heads, sizes)
    return torch.zeros(size, dtype=torch.int32, device=weights.sa_norm[0].device)


def _workspace_size(batch: int, num_heads: int, sizes: DecodeSizes) -> int:
    hidden_size, intermediate_size, qkv_rows, _, head_dim = sizes
    return decode_workspace_size(
        batch, hidden_size, intermediate_size, qkv_rows, num_heads, head_dim
    )


def decode_step(
    x: Tensor,
    weights: DecodeWeights,
    *,
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    first_key: Tensor | None = None,
    overflow: Tensor,
    workspace: Tensor,
    out: Tensor,
    num_heads: int,
    norm_eps: float,
    weight_in_fp32: bool = False,
    rope_interleaved: bool,
    activation: str = "silu",
    windows: Sequence[int] | None = None,
    rank_sums: Sequence[Tensor] = (),
    rank: int = 0,
) -> None:
    """Run one token a row through a shard: writes ``out``, both caches and ``overflow`` in place.

    A layer is :func:`linear` of :func:`rms_norm`, norms of q and k, :func:`rope_append`,
    :func:`cached_attention`, :func:`linear` with the residual, :func:`rms_norm` and
    :func:`fused_mlp` with the residual; each result is rounded to the dtype of the weights.

    All tensors are contiguous, and all but those of int64 16-byte aligned.

    Args:
        x: ``[b]`` int64 tokens with an embedding, rows of it; else the hidden state, ``[b,
            hidden_size]``, dtype of the weights. b is 1 to 8.
        weights: float16, bfloat16, or float32 (not on CUDA); of 1 to 128 layers. hidden_size and
            intermediate_size are multiples of 8, head_dim is 64, 96 or 128.
        k_cache: A layer's ``[B, num_kv_heads, max_seq_len, head_dim]``, ``B >= b``, one shape for
            all layers; dtype of the weights. Row ``i`` of the batch writes slot
            ``slots[i]`` and attends to slots ``first_key[i]`` to ``slots[i]``.
        v_cache: As ``k_cache``.
        rope_table: ``[max_positions, rotary_dim // 2, 2]``, float32, as in :func:`apply_rope`.
        positions: ``[b]`` int64, rows of ``rope_table``.
        slots: ``[b]`` int64, rows of the caches; each row has its own.
        first_key: ``[b]`` int64, slots before it (left padding) are not attended to.
        overflow: ``[1]`` int32, set to 1 where a slot or a position was out of range: that row is
            not written to the caches, and its output means nothing. Also where a token was: that
            row is as of token 0.
        workspace: From :func:`new_decode_workspace`, for at least b rows; of these weights alone.
        out: ``[b, vocab_size]`` float32 logits of the last shard, rounded to the dtype of the
            weights before; of ranks, those of this rank's rows of the head. Else the hidden state,
            as ``x``.
        num_heads: Query heads, 1 to 8 times the key/value heads.
        norm_eps: Of every norm.
        weight_in_fp32: Of every norm, as in :func:`rms_norm`; the kernel, which scales products
            afterwards, looks at it for the norms of q and k only.
        rope_interleaved: As in :func:`apply_rope`.
        activation: As in :func:`fused_mlp`.
        windows: A layer's sliding window, the token itself included; 0, or None for all layers: no
            window.
        rank_sums: Where ranks, each on a GPU of its own, share the layers: memory of each, int64
            ``[decode_rank_sums_size(num_ranks, hidden_size)]``, zeros before the first step, which
            all of them can reach. Each runs the same steps, and waits for the others: products with
            ``output_weight`` and ``down_weight`` are added up over the ranks in float32, before the
            bias, the residual and the only rounding. CUDA only.
        rank: This one.

    Raises:
        ValueError: A shape, size, stride or device is not as above.
        TypeError: A dtype is not as above.
        RuntimeError: "decode_step: cannot be resident": this GPU cannot hold all blocks of the
            launch at a time; nothing was written. Or a gradient is asked for, which this op has
            not.
    """
    step = DecodeArguments(
        x,
        weights.embedding,
        *(list(getattr(weights, name)) for name in WEIGHT_LISTS),
        weights.norm,
        weights.head,
        list(k_cache),
        list(v_cache),
        rope_table,
        positions,
        slots,
        first_key,
        overflow,
        workspace,
        out,
        num_heads,
        norm_eps,
        weight_in_fp32,
        rope_interleaved,
        activation,
        [0] * len(weights.sa_norm) if windows is None else list(windows),
        list(rank_sums),
        rank,
    )
    sizes = decode_sizes(weights, num_heads)
    check_rank_sums(step, sizes.hidden_size)
    check_weights(step, sizes)
    rule = decode_step_refusal(
        batch=x.shape[0] if x.dim() else 0,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        num_layers=len(weights.sa_norm),
        activation=activation,
    )
    if rule is not None:
        raise ValueError(rule)
    check_state(step, sizes, _workspace_size(x.shape[0], num_heads, sizes))
    if torch.is_grad_enabled():
        refuse_gradients("decode_step", **_tensors_by_name(step))
    torch.ops.fastshard.decode_step.default(*step)


def _tensors_by_name(step: DecodeArguments) -> dict[str, Tensor]:
    """Every tensor of a step, those of a list as ``name[i]``."""
    named = {}
    for name, value in step._asdict().items():
        for i, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, Tensor):
                named[f"{name}[{i}]" if isinstance(value, list) else name] = tensor
    return named


@torch.library.register_fake("fastshard::decode_step")
def _(*arguments) -> None:
    return None


@torch.library.impl("fastshard::decode_step", "cpu")
def _(*arguments) -> None:
    step = DecodeArguments(*arguments)
    if step.rank_sums:
        raise RuntimeError("decode_step: ranks share layers on GPUs only, got cpu")
    eps, in_fp32 = step.norm_eps, step.weight_in_fp32

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, eps, weight_in_fp32=in_fp32)

    x = step.x if step.embedding is None else _embed(step, step.embedding)
    for i in range(len(step.sa_norm)):
        bias = step.output_bias[i] if step.output_bias else None
        heads = _attend(step, i, normed(x, step.sa_norm[i]), normed)
        x = linear(heads, step.output_weight[i], bias, residual=x)
        x = fused_mlp(
            normed(x, step.mlp_norm[i]),
            step.gate_up_weight[i],
            step.down_weight[i],
            activation=step.activation,
            residual=x,
        )
    step.out.copy_(x if step.head is None else linear(normed(x, step.norm), step.head))


def _embed(step: DecodeArguments, embedding: Tensor) -> Tensor:
    """Rows of the embedding; a token that is none sets the flag, and reads the first."""
    is_inside = (step.x >= 0) & (step.x < embedding.shape[0])
    if not is_inside.all():
        step.overflow.fill_(1)
    return embedding[step.x.where(is_inside, 0)]


def _attend(step: DecodeArguments, layer: int, x: Tensor, normed) -> Tensor:
    """From the normed ``x`` ``[b, hidden_size]`` to the heads' ``[b, num_heads * head_dim]``."""
    k_cache, v_cache = step.k_cache[layer], step.v_cache[layer]
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    qkv = linear(x, step.qkv_weight[layer], step.qkv_bias[layer] if step.qkv_bias else None)
    qkv = qkv.unflatten(-1, (1, -1, head_dim))  # [b, 1, heads, head_dim]
    q, k, v = qkv.split((step.num_heads, num_kv_heads, num_kv_heads), dim=2)
    if step.q_norm:
        q, k = normed(q, step.q_norm[layer]), normed(k, step.k_norm[layer])
    positions, slots = step.positions[:, None], step.slots[:, None]
    q = rope_append(
        *(q, k, v, step.rope_table, positions, k_cache, v_cache, slots, step.overflow),
        interleaved=step.rope_interleaved,
    )
    window = step.windows[layer] or None
    lengths = step.slots + 1
    heads = cached_attention(q, k_cache, v_cache, lengths, first_key=step.first_key, window=window)
    return heads.flatten(1)


@cost("decode_step")
def _(*arguments) -> Cost:
    step = DecodeArguments(*arguments)
    batch, hidden_size = step.x.shape[0], step.sa_norm[0].shape[0]
    weights = [tensor for name in WEIGHT_LISTS for tensor in getattr(step, name)]
    weights += [tensor for tensor in (step.norm, step.head) if tensor is not None]
    _, num_kv_heads, _, head_dim = step.k_cache[0].shape
    num_keys = sum(_keys_read(step, window) for window in step.windows)
    numel = sum(weight.numel() for weight in weights)
    numel += 2 * num_kv_heads * head_dim * (num_keys + batch * len(step.windows))
    numel += batch * hidden_size * (2 if step.head is None else 1)  # the row in, and the one out
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return Cost(
        bytes=numel * step.sa_norm[0].element_size()
        + (step.head is not None) * step.out.numel() * 4,
        flops=2 * batch * matrices + 4 * step.num_heads * head_dim * num_keys,
    )


def _keys_read(step: DecodeArguments, window: int) -> int:
    """Keys that all rows attend to in one layer; at most, where the slots are not on the CPU."""
    max_seq_len = step.k_cache[0].shape[2]
    if step.slots.device.type != "cpu":
        return step.slots.numel() * min(window or max_seq_len, max_seq_len)
    first = torch.zeros_like(step.slots) if step.first_key is None else step.first_key
    keys = (step.slots.clamp(0, max_seq_len - 1) + 1 - first).clamp(min=0)
    return int((keys.clamp(max=window) if window else keys).sum())
