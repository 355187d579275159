"""Cut a model's layers over ranks of any sizes by bytes, and say what each of them holds.

The largest share, bytes needed over bytes free, is as small as any contiguous cut can make it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastshard.models import ModelBytes, ModelConfig, Shard, model_bytes


@dataclass(frozen=True)
class RankShare:
    """What one rank holds, in bytes.

    Attributes:
        rank: From 0, in the order of the layers; ranks that share their layers are neighbours.
        shard: Its layers.
        weight_bytes: Parameters; embedding, head and final norm where it has them.
        cache_bytes: Keys and values of its layers.
        table_bytes: Its RoPE table.
        reserve_bytes: What is kept for all else.
        free_bytes: What the rank has.
    """

    rank: int
    shard: Shard
    weight_bytes: int
    cache_bytes: int
    table_bytes: int
    reserve_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All that it takes, the reserve included."""
        return self.weight_bytes + self.cache_bytes + self.table_bytes + self.reserve_bytes

    @property
    def share(self) -> float:
        """Needed over free; above 1 it does not fit."""
        return self.needed_bytes / self.free_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes


def partition(
    config: ModelConfig,
    free: Sequence[int],
    *,
    dtype: torch.dtype,
    context: int,
    batch: int = 1,
    reserve: int = 0,
    layers: Sequence[range] | None = None,
    tp: int = 1,
    model_id: str = "",
) -> list[Shard]:
    """Give each rank its layers, or raise where they do not fit.

    Args:
        config: Of the whole model; the others as for ``plan``.

    Returns:
        A shard a rank.

    Raises:
        ValueError: as ``plan`` and ``check_shares``.
    """
    shares = plan(
        config,
        free,
        dtype=dtype,
        context=context,
        batch=batch,
        reserve=reserve,
        layers=layers,
        tp=tp,
        model_id=model_id,
    )
    check_shares(shares)
    return [share.shard for share in shares]


def plan(
    config: ModelConfig,
    free: Sequence[int],
    *,
    dtype: torch.dtype,
    context: int,
    batch: int = 1,
    reserve: int = 0,
    layers: Sequence[range] | None = None,
    tp: int = 1,
    model_id: str = "",
) -> list[RankShare]:
    """What each rank holds, whether it fits or not.

    Args:
        config: Of the whole model.
        free: Bytes of each rank, in the order of the layers; every rank gets at least one layer.
        dtype: Of weights and cache.
        context: Slots of the cache.
        batch: Rows of the cache.
        reserve: Bytes of each rank that are kept for all else.
        layers: A cut by hand, half-open ranges, one a rank, or one for each ``tp`` ranks; None:
            ``smallest_largest_share``.
        tp: So many ranks in turn share their layers: each holds a part of every one.
        model_id: Of the shards.

    Raises:
        ValueError: there are no ranks or more than layers, ``layers`` leave one out, hold one twice
            or are not one range a rank, the model or the ranks cannot be divided by ``tp``, or a
            number is out of its range.
    """
    num_layers = config.num_layers
    _check_numbers(config, free, context, batch, reserve, tp)
    sizes = model_bytes(config, dtype, context, batch, tp)
    least = [min(free[i : i + tp]) for i in range(0, len(free), tp)]  # they hold the same bytes
    if layers is None:
        layers = smallest_largest_share(sizes, least, reserve)
    elif len(layers) != len(least):
        what = "ranks" if tp == 1 else f"times tp={tp} ranks"
        raise ValueError(
            f"layers must be one range for each of {len(least)} {what}, got {_text(layers)}"
        )
    check_cover(layers, num_layers)
    return [
        RankShare(
            rank=rank,
            shard=Shard(model_id, part.start, part.stop - 1, num_layers),
            weight_bytes=sizes.weights(part),
            cache_bytes=sizes.caches(part),
            table_bytes=sizes.table,
            reserve_bytes=reserve,
            free_bytes=free[rank],
        )
        for rank, part in enumerate(part for part in layers for _ in range(tp))
    ]


def _check_numbers(
    config: ModelConfig, free: Sequence[int], context: int, batch: int, reserve: int, tp: int
) -> None:
    num_layers = config.num_layers
    if tp < 1:
        raise ValueError(f"tp must be at least 1, got {tp}")
    if len(free) % tp:
        raise ValueError(f"ranks must be a multiple of tp={tp}, got {len(free)}")
    if not 1 <= len(free) // tp <= num_layers:
        times = "" if tp == 1 else f" times tp={tp}"
        raise ValueError(
            f"ranks must be 1 to the model's {num_layers} layers{times}, got {len(free)}"
        )
    if min(free) <= 0:
        raise ValueError(f"free bytes of every rank must be positive, got {list(free)}")
    if not 1 <= context <= config.max_seq_len:
        raise ValueError(f"context must be 1 to max_seq_len={config.max_seq_len}, got {context}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if reserve < 0:
        raise ValueError(f"reserve must be at least 0 bytes, got {reserve}")


def check_shares(shares: Sequence[RankShare]) -> None:
    """Raise where a rank needs more than it has.

    Raises:
        ValueError: names each such rank, its layers, and its bytes needed and free.
    """
    too_large = [
        f"rank {share.rank} needs {share.needed_bytes:,} bytes for layers "
        f"{share.shard.start_layer}-{share.shard.end_layer} and has {share.free_bytes:,} free"
        for share in shares
        if not share.fits
    ]
    if too_large:
        raise ValueError(f"the model does not fit: {'; '.join(too_large)}")


def check_cover(layers: Sequence[range], num_layers: int) -> None:
    """Raise unless half-open ranges hold each layer once, in order, and none is empty.

    Raises:
        ValueError: names the ranges, both ends included.
    """
    if [i for part in layers for i in part] != list(range(num_layers)) or not all(map(len, layers)):
        raise ValueError(
            f"layers must hold each of 0-{num_layers - 1} once, in order, got {_text(layers)}"
        )


def smallest_largest_share(sizes: ModelBytes, free: Sequence[int], reserve: int = 0) -> list[range]:
    """Cut so that the largest share, bytes needed over free bytes of a rank, is smallest.

    Of several such cuts it is the one of the smallest sum of squared shares.

    Args:
        sizes: Of the model's parts.
        free: Bytes of each rank, in the order of the layers, at most as many ranks as layers.
        reserve: Bytes that each rank needs besides.

    Returns:
        Half-open ranges of layers, at least one layer each, whether they fit or not.
    """

    def share(rank: int, part: range) -> float:
        return (sizes.needed(part) + reserve) / free[rank]

    # Two passes: of the cuts of a prefix the one that is best in itself may be uneven, and a worse
    # one good enough, where a later rank has the largest share.
    layers = _best_cut(sizes.num_layers, len(free), share, max)
    limit = max(share(rank, part) for rank, part in enumerate(layers))

    def squared(rank: int, part: range) -> float:
        value = share(rank, part)
        return value * value if value <= limit else math.inf

    return _best_cut(sizes.num_layers, len(free), squared, lambda a, b: a + b)


def split_that_fits(sizes: ModelBytes, available: int, reserve: int = 0) -> list[range] | None:
    """The fewest shards of at most ``available`` bytes each, as even as they can be.

    Returns:
        Half-open ranges of layers, in order, or None where one layer with its ends is too much.
    """

    def fits(part: range) -> bool:
        return sizes.needed(part) + reserve <= available

    num_layers = sizes.num_layers
    if not all(fits(part) for part in even_split(num_layers, num_layers)):
        return None
    fewest = math.ceil(sizes.needed(range(num_layers)) / (available - reserve))
    for count in range(fewest, num_layers):
        layers = smallest_largest_share(sizes, [available] * count, reserve)
        if all(map(fits, layers)):
            return layers
    return even_split(num_layers, num_layers)


def even_split(num_layers: int, count: int) -> list[range]:
    """``count`` ranges of layers whose lengths differ by at most one, longer ones first.

    Raises:
        ValueError: not ``1 <= count <= num_layers``.
    """
    if not 1 <= count <= num_layers:
        raise ValueError(f"shards must be 1 to the model's {num_layers} layers, got {count}")
    base, longer = divmod(num_layers, count)
    bounds = [i * base + min(i, longer) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _best_cut(
    num_layers: int,
    num_ranks: int,
    cost: Callable[[int, range], float],
    join: Callable[[float, float], float],
) -> list[range]:
    """The contiguous cut of least cost, by dynamic programming over ranks and layers.

    Args:
        cost: Of a rank and its half-open range of layers.
        join: Cost of the ranks before, and of one more -> of them together; monotone.
    """
    best = {0: (0.0, [0])}  # layers that the ranks so far hold -> least cost, bounds of the cut
    for rank in range(num_ranks):
        left = num_ranks - rank - 1  # ranks that need a layer each
        stops = range(rank + 1, num_layers - left + 1) if left else (num_layers,)
        best = {
            stop: min(
                (join(before, cost(rank, range(start, stop))), [*bounds, stop])
                for start, (before, bounds) in best.items()
                if start < stop
            )
            for stop in stops
        }
    return [range(a, b) for a, b in pairwise(best[num_layers][1])]


def _text(layers: Sequence[range]) -> str:
    return ",".join(f"{part.start}-{part.stop - 1}" for part in layers)
