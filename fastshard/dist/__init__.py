"""Many devices: which of them holds which layers."""

from fastshard.dist.fit import check_fit
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

__all__ = [
    "RankShare",
    "check_cover",
    "check_fit",
    "check_shares",
    "even_split",
    "partition",
    "plan",
    "smallest_largest_share",
    "split_that_fits",
]
