"""The arguments of ``decode_step``: the weights of a shard, all in their order, and the checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastshard.ops._checks import check_device, check_dtype, check_floating
from fastshard.ops.activation import ACTIVATIONS

MAX_BATCH = 8
MAX_LAYERS = 128
MAX_GROUP = 8  # query heads of one key/value head
MAX_RANKS = 8
HEAD_DIMS = (64, 96, 128)


@dataclass(frozen=True)
class DecodeWeights:
    """The weights of one shard, a list entry a layer; contiguous, of one dtype and device.

    Attributes:
        sa_norm: ``[hidden_size]``, before the attention.
        qkv_weight: ``[(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]``: q, k, v rows.
        output_weight: ``[hidden_size, num_heads * head_dim]``.
        mlp_norm: ``[hidden_size]``, before the MLP.
        gate_up_weight: ``[2 * intermediate_size, hidden_size]``, rows gate 0, up 0, gate 1, ...
        down_weight: ``[hidden_size, intermediate_size]``.
        qkv_bias: ``[(num_heads + 2 * num_kv_heads) * head_dim]``; empty: no bias.
        output_bias: ``[hidden_size]``; empty: no bias.
        q_norm: ``[head_dim]``, of each query head before RoPE; empty: none. With ``k_norm``.
        k_norm: ``[head_dim]``, of each key head.
        embedding: ``[vocab_size, hidden_size]``, of the first shard; else None.
        norm: ``[hidden_size]``, before the head, of the last shard; else None.
        head: ``[vocab_size, hidden_size]``, with ``norm``; a tied one is ``embedding`` itself.

    Of ranks that share each layer ``num_heads``, ``num_kv_heads``, ``intermediate_size`` and the
    rows of ``head`` are this rank's; the embedding, norms and ``output_bias`` are whole.
    """

    sa_norm: Sequence[Tensor]
    qkv_weight: Sequence[Tensor]
    output_weight: Sequence[Tensor]
    mlp_norm: Sequence[Tensor]
    gate_up_weight: Sequence[Tensor]
    down_weight: Sequence[Tensor]
    qkv_bias: Sequence[Tensor] = ()
    output_bias: Sequence[Tensor] = ()
    q_norm: Sequence[Tensor] = ()
    k_norm: Sequence[Tensor] = ()
    embedding: Tensor | None = None
    norm: Tensor | None = None
    head: Tensor | None = None


WEIGHT_LISTS = (
    *("sa_norm", "qkv_weight", "qkv_bias", "q_norm", "k_norm", "output_weight", "output_bias"),
    *("mlp_norm", "gate_up_weight", "down_weight"),
)
"""The weights of which every layer has one, in the order of the raw op."""


class DecodeArguments(NamedTuple):
    """The arguments of the raw op, in its order."""

    x: Tensor
    embedding: Tensor | None
    sa_norm: list[Tensor]
    qkv_weight: list[Tensor]
    qkv_bias: list[Tensor]
    q_norm: list[Tensor]
    k_norm: list[Tensor]
    output_weight: list[Tensor]
    output_bias: list[Tensor]
    mlp_norm: list[Tensor]
    gate_up_weight: list[Tensor]
    down_weight: list[Tensor]
    norm: Tensor | None
    head: Tensor | None
    k_cache: list[Tensor]
    v_cache: list[Tensor]
    rope_table: Tensor
    positions: Tensor
    slots: Tensor
    first_key: Tensor | None
    overflow: Tensor
    workspace: Tensor
    out: Tensor
    num_heads: int
    norm_eps: float
    weight_in_fp32: bool
    rope_interleaved: bool
    activation: str
    windows: list[int]
    rank_sums: Sequence[Tensor] = ()
    rank: int = 0


class DecodeSizes(NamedTuple):
    """The sizes of a layer, as the first one has them."""

    hidden_size: int
    intermediate_size: int
    qkv_rows: int
    num_kv_heads: int
    head_dim: int


def decode_sizes(weights: DecodeWeights | DecodeArguments, num_heads: int) -> DecodeSizes:
    """Read the sizes from the first layer's shapes.

    Raises:
        ValueError: there is no layer, or no number of key/value heads explains the shapes.
    """
    for name in ("sa_norm", "qkv_weight", "output_weight", "down_weight"):
        tensors, dims = getattr(weights, name), 1 if name == "sa_norm" else 2
        if len(tensors) == 0 or tensors[0].dim() != dims:
            got = list(tensors[0].shape) if len(tensors) else "no layer"
            raise ValueError(f"{name} must have {dims} dimensions a layer, got {got}")
    q_rows, qkv_rows = weights.output_weight[0].shape[1], weights.qkv_weight[0].shape[0]
    if num_heads < 1 or q_rows < num_heads or q_rows % num_heads:
        raise ValueError(f"num_heads must divide output_weight's {q_rows} columns, got {num_heads}")
    head_dim = q_rows // num_heads
    if qkv_rows <= q_rows or (qkv_rows - q_rows) % (2 * head_dim):
        raise ValueError(
            f"qkv_weight must have {q_rows} rows of q and two times whole heads of {head_dim}, "
            f"got {qkv_rows} rows"
        )
    return DecodeSizes(
        hidden_size=weights.sa_norm[0].shape[0],
        intermediate_size=weights.down_weight[0].shape[1],
        qkv_rows=qkv_rows,
        num_kv_heads=(qkv_rows - q_rows) // (2 * head_dim),
        head_dim=head_dim,
    )


def decode_step_refusal(
    *,
    batch: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int,
    activation: str,
) -> str | None:
    """Name the first rule of :func:`decode_step` that these sizes break; None: it takes them."""
    for name, value, most in (("batch", batch, MAX_BATCH), ("num_layers", num_layers, MAX_LAYERS)):
        if not 1 <= value <= most:
            return f"{name} must be 1 to {most}, got {value}"
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, value in sizes.items():
        if value < 8 or value % 8:
            return f"{name} must be a positive multiple of 8, got {value}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if num_kv_heads < 1 or num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return (
            f"num_heads must be 1 to {MAX_GROUP} times the {num_kv_heads} key/value heads, "
            f"got {num_heads}"
        )
    if activation not in ACTIVATIONS:
        return f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
    return None


def check_weights(step: DecodeArguments, sizes: DecodeSizes) -> None:
    """Raise unless the weights are what the op takes, and fit each other."""
    num_layers, like = len(step.sa_norm), step.sa_norm[0]
    check_floating("sa_norm[0]", like)
    if like.is_cuda and like.dtype == torch.float32:
        raise TypeError("weights must be float16 or bfloat16 on CUDA, got torch.float32")
    hidden_size, _, qkv_rows, _, head_dim = sizes
    shapes = {
        "sa_norm": (hidden_size,),
        "qkv_weight": (qkv_rows, hidden_size),
        "qkv_bias": (qkv_rows,),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
        "output_weight": (hidden_size, step.num_heads * head_dim),
        "output_bias": (hidden_size,),
        "mlp_norm": (hidden_size,),
        "gate_up_weight": (2 * sizes.intermediate_size, hidden_size),
        "down_weight": (hidden_size, sizes.intermediate_size),
    }
    for name, shape in shapes.items():
        tensors = getattr(step, name)
        may_lack = name in ("qkv_bias", "q_norm", "k_norm", "output_bias")
        if len(tensors) != num_layers and (tensors or not may_lack):
            rule = f"{num_layers} tensors like sa_norm{', or none' if may_lack else ''}"
            raise ValueError(f"{name} must have {rule}, got {len(tensors)}")
        if _all_fit(tensors, shape, like.dtype, like.device):
            continue
        for i, tensor in enumerate(tensors):
            _check_tensor(f"{name}[{i}]", tensor, shape, like.dtype, like.device)
    if bool(step.q_norm) != bool(step.k_norm):
        raise ValueError(
            f"q_norm and k_norm must be given together, got {len(step.q_norm)} and "
            f"{len(step.k_norm)} tensors"
        )
    if (step.norm is None) != (step.head is None):
        raise ValueError(f"norm and head must be given together, got {step.norm}, {step.head}")
    vocab_size = "vocab_size"
    if step.embedding is not None:
        vocab_size = step.embedding.shape[0] // max(1, len(step.rank_sums))
    for name, shape in (
        ("norm", (hidden_size,)),
        ("embedding", ("vocab_size", hidden_size)),
        ("head", (vocab_size, hidden_size)),  # of ranks: a part of the rows
    ):
        if getattr(step, name) is not None:
            _check_tensor(name, getattr(step, name), shape, like.dtype, like.device)
    if len(step.windows) != num_layers or min(step.windows) < 0:
        raise ValueError(f"windows must be {num_layers} of at least 0, got {step.windows}")


def check_state(step: DecodeArguments, sizes: DecodeSizes, workspace_size: int) -> None:
    """Raise unless input, caches, indices and output fit the weights."""
    dtype, device = step.sa_norm[0].dtype, step.sa_norm[0].device
    hidden_size, _, _, num_kv_heads, head_dim = sizes
    batch = step.x.shape[0]
    if step.embedding is None:
        _check_tensor("x", step.x, ("b", hidden_size), dtype, device)
    else:
        _check_tensor("x", step.x, ("b",), torch.int64, device)
    cache_shape = ("B", num_kv_heads, "max_seq_len", head_dim)
    for name in ("k_cache", "v_cache"):
        caches = getattr(step, name)
        if len(caches) != len(step.sa_norm):
            rule = f"{len(step.sa_norm)} tensors like sa_norm"
            raise ValueError(f"{name} must have {rule}, got {len(caches)}")
        _check_tensor(f"{name}[0]", caches[0], cache_shape, dtype, device)
        cache_shape = tuple(caches[0].shape)  # the others are as large as the first
        if _all_fit(caches, cache_shape, dtype, device):
            continue
        for i, cache in enumerate(caches):
            _check_tensor(f"{name}[{i}]", cache, cache_shape, dtype, device)
    if cache_shape[0] < batch:
        raise ValueError(f"batch must be at most the caches' {cache_shape[0]}, got {batch}")
    for name in ("positions", "slots", "first_key"):
        if getattr(step, name) is not None:
            _check_tensor(name, getattr(step, name), (batch,), torch.int64, device)
    _check_tensor("overflow", step.overflow, (1,), torch.int32, device)
    table_shape = ("max_positions", "rotary_dim // 2", 2)
    _check_tensor("rope_table", step.rope_table, table_shape, torch.float32, device)
    if 2 * step.rope_table.shape[1] > head_dim:
        raise ValueError(
            f"rope_table must rotate at most head_dim = {head_dim} elements, "
            f"got rotary_dim {2 * step.rope_table.shape[1]}"
        )
    _check_tensor("workspace", step.workspace, ("size",), torch.int32, device)
    if step.workspace.numel() < workspace_size:
        raise ValueError(
            f"workspace must have at least {workspace_size} words for these sizes, "
            f"got {step.workspace.numel()}"
        )
    if step.head is None:
        _check_tensor("out", step.out, (batch, hidden_size), dtype, device)
    else:
        _check_tensor("out", step.out, (batch, step.head.shape[0]), torch.float32, device)


def check_rank_sums(step: DecodeArguments, hidden_size: int) -> None:
    """Raise unless there is memory of all ranks, or none."""
    num_ranks, like = len(step.rank_sums), step.sa_norm[0]
    if num_ranks == 0:
        if step.rank != 0:
            raise ValueError(f"rank must be 0 without rank_sums, got {step.rank}")
        return
    if not 2 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"rank_sums must be of 2 to {MAX_RANKS} ranks, or none, got {num_ranks}")
    if not 0 <= step.rank < num_ranks:
        raise ValueError(f"rank must be 0 to {num_ranks - 1}, got {step.rank}")
    size = decode_rank_sums_size(num_ranks, hidden_size)
    for i, memory in enumerate(step.rank_sums):
        # Of another rank it may be the memory of another GPU.
        device = like.device if i == step.rank else memory.device
        _check_tensor(f"rank_sums[{i}]", memory, (size,), torch.int64, device)


def decode_rank_sums_size(num_ranks: int, hidden_size: int) -> int:
    """How many int64 words each of the ``rank_sums`` of :func:`decode_step` has."""
    return 16 + 2 * num_ranks * MAX_BATCH * hidden_size


def _all_fit(
    tensors: list[Tensor], shape: tuple[int | str, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``_check_tensor`` passes for each; may say no where it does."""
    if torch.compiler.is_compiling():  # which knows no offsets
        return False
    for tensor in tensors:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            return False
        if not tensor.is_contiguous() or tensor.storage_offset() * dtype.itemsize % 16:
            return False
    return True


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless it is contiguous, aligned and of ``shape``, whose words are any size above 0."""
    check_dtype(name, tensor, dtype)
    check_device(name, tensor, device)
    fits = tensor.dim() == len(shape) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous [{', '.join(map(str, shape))}], "
            f"got shape {list(tensor.shape)} and strides {list(tensor.stride())}"
        )
    if dtype == torch.int64 or torch.compiler.is_compiling():
        return  # indices are read one by one, and tracing knows no offsets
    offset = tensor.storage_offset() * tensor.element_size()
    if offset % 16:
        raise ValueError(f"{name} must be 16-byte aligned, got one {offset} bytes into its storage")
