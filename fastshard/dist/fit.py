"""Whether shards fit on one device, and which cut would."""

from collections.abc import Sequence

import torch

from fastshard.dist.partition import split_that_fits
from fastshard.models import ModelConfig, Shard, model_bytes

WORKSPACE_BYTES = 256 << 20
"""Activations, library handles and workspaces of a running model."""


def check_fit(
    config: ModelConfig,
    shards: Sequence[Shard],
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    available: int,
    tp: int = 1,
) -> None:
    """Raise where the shards together need more than ``available`` bytes of ``device``.

    Args:
        tp: Ranks that share each layer; the device holds the part of one of them.

    Raises:
        RuntimeError: says what is needed, what is there, and the shards that would fit.
    """
    sizes = model_bytes(config, dtype, context, tp=tp)
    needed = WORKSPACE_BYTES + sum(sizes.needed(shard.layers) for shard in shards)
    if needed <= available:
        return
    parts = split_that_fits(sizes, available, WORKSPACE_BYTES)
    if parts is None:
        advice = "not even one layer a device would fit"
    elif len(parts) == 1:
        advice = "the whole model would fit as one shard"
    else:
        layers = ",".join(f"{part.start}-{part.stop - 1}" for part in parts)
        advice = f"{len(parts)} shards on devices like this would fit: layers {layers}"
    raise RuntimeError(
        f"{_describe(shards, tp)} of the model in {dtype} with a cache of "
        f"{min(context, config.max_seq_len)} tokens needs {needed / 2**30:.2f} GiB on {device}, "
        f"which has {available / 2**30:.2f} GiB free; {advice}"
    )


def _describe(shards: Sequence[Shard], tp: int) -> str:
    layers = ",".join(f"{shard.start_layer}-{shard.end_layer}" for shard in shards)
    return f"layers {layers}" if tp == 1 else f"1/{tp} of layers {layers}"
