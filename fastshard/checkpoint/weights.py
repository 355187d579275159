"""Copy a shard's tensors from a checkpoint into a model, one block of rows at a time."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fastshard.checkpoint import names
from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.index import WeightIndex
from fastshard.checkpoint.tensor_files import TensorFile
from fastshard.models import WHOLE, ModelConfig, Shard, TensorPart

_BLOCK_BYTES = 64 << 20  # of the file; bounds host memory, and large enough to stream


@torch.no_grad()
def load_weights(
    targets: Mapping[str, Tensor],
    index: WeightIndex,
    config: ModelConfig,
    shard: Shard,
    report: Callable[[int], None] | None = None,
    *,
    parts: Mapping[str, TensorPart] | None = None,
) -> None:
    """Fill ``targets`` in place with the checkpoint's tensors, cast to their dtype.

    Everything is checked before the first byte is copied.

    Args:
        targets: The decoder's state dict under torchtune's names, all of this shard and no other.
        index: The checkpoint, under Hugging Face's or torchtune's names.
        report: Called after each block with its number of elements.
        parts: Name -> which part of the checkpoint's tensor the target is, and all that is read of
            it; those not named are whole.

    Raises:
        CheckpointError: a tensor of this shard is missing, unexpected, truncated or of another
            shape or dtype; the message names file and tensor.
    """
    parts = parts or {}
    sources = match_names(targets, index, config, shard)
    index.fetch(sources.values())
    for name, target in targets.items():
        _check(name, parts.get(name, WHOLE).whole_shape(target.shape), sources[name], index)

    permutes = config.rope_interleaved and any(map(names.is_hugging_face, index.file_names))
    for name, target in targets.items():
        rotates = permutes and names.is_rotated(name)
        head = (config.head_dim, config.rotary_dim) if rotates else None
        file, part = index.file_of(sources[name]), parts.get(name, WHOLE)
        for num_elements in _copy(target, file, sources[name], part, head):
            if report:
                report(num_elements)


def _copy(
    target: Tensor,
    file: TensorFile,
    source: str,
    part: TensorPart,
    head: tuple[int, int] | None,
) -> Iterator[int]:
    """Fill ``target`` block by block; yields how many elements each has.

    Args:
        source: Name in the file.
        head: Where rows are to be permuted, head by head: head_dim and rotary_dim.
    """
    first = part.span(0, target.shape[0]).start
    columns = part.span(1, target.shape[1]) if part.dim == 1 else None
    row_bytes = file.tensors[source].dtype.itemsize * math.prod(target.shape[1:])
    step = max(1, _BLOCK_BYTES // row_bytes)
    if head:  # whole heads
        step = max(1, step // head[0]) * head[0]
    for start in range(0, target.shape[0], step):
        stop = min(start + step, target.shape[0])
        block = file.read_rows(source, first + start, first + stop, columns)
        # To the device as it is in the file: a cast on the way would cost host memory.
        block = block.to(target.device)
        if head:
            names.copy_rotated(target[start:stop], block, *head)
        else:
            target[start:stop].copy_(block)
        yield block.numel()


def match_names(
    targets: Mapping[str, Tensor], index: WeightIndex, config: ModelConfig, shard: Shard
) -> dict[str, str]:
    """Our tensor names -> the checkpoint's.

    Raises:
        CheckpointError: a name of this shard is missing, or one is there that it has no place for.
    """
    present = index.file_names
    theirs = any(map(names.is_hugging_face, present))
    sources = {name: names.hugging_face_name(name) if theirs else name for name in targets}
    missing = [source for source in sources.values() if source not in present]
    extra = [name for name in present if _is_extra(name, set(sources.values()), config, shard)]
    problems = [
        f"{label} {', '.join(found[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"
        for label, found in (("missing tensors", missing), ("unexpected tensors", extra))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{index.where}: {'; '.join(problems)} for {_describe(config, shard)}"
        )
    return sources


def _is_extra(name: str, expected: set[str], config: ModelConfig, shard: Shard) -> bool:
    """Whether this shard has no place for the tensor, and no other shard can have one."""
    if name in expected or names.is_derived(name):
        return False
    layer = names.layer_of(name)
    if layer is None:  # other shards' ends; a tied head that a checkpoint repeats is not read
        return not names.is_known_top_level(name)
    return layer >= config.num_layers or layer in shard.layers


def _check(name: str, shape: tuple[int, ...], source: str, index: WeightIndex) -> None:
    file = index.file_of(source)
    info = file.tensors[source]
    if info.shape != shape:
        raise CheckpointError(
            f"{file.path}: {source} must have shape {list(shape)} for {name}, "
            f"got {list(info.shape)}"
        )
    if info.dtype is None:
        raise CheckpointError(
            f"{file.path}: {source} must be float64, float32, float16 or bfloat16 "
            "(quantized weights are not supported)"
        )


def _describe(config: ModelConfig, shard: Shard) -> str:
    return (
        f"layers {shard.start_layer}-{shard.end_layer} of a {config.model_type} model of "
        f"{config.num_layers} layers"
    )
