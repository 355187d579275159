"""Many devices: which of them holds which layers, and the processes that run them."""

from fastshard.dist.fit import WORKSPACE_BYTES, check_fit
from fastshard.dist.hops import Hop, Sent
from fastshard.dist.partition import (
    RankShare,
    check_cover,
    check_shares,
    even_split,
    partition,
    plan,
    smallest_largest_share,
    split_that_fits,
)
from fastshard.dist.world import World, join_world

__all__ = [
    "WORKSPACE_BYTES",
    "Hop",
    "RankShare",
    "Sent",
    "World",
    "check_cover",
    "check_fit",
    "check_shares",
    "even_split",
    "join_world",
    "partition",
    "plan",
    "smallest_largest_share",
    "split_that_fits",
]
