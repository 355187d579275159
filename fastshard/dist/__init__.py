"""Many devices: which of them holds which layers, and the processes that run them."""

from fastshard.dist.fit import WORKSPACE_BYTES, check_fit
from fastshard.dist.hops import MAX_TOKENS, Hop, Hops, Sent, connect
from fastshard.dist.identity import check_same
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
from fastshard.dist.steps import Steps
from fastshard.dist.tensor_parallel import TensorParallel, TensorParallelDecoder
from fastshard.dist.verdict import RunError
from fastshard.dist.watch import Watch
from fastshard.dist.world import SUM_WAYS, World, join_world, local_device, torchrun_store

__all__ = [
    "MAX_TOKENS",
    "SUM_WAYS",
    "WORKSPACE_BYTES",
    "Hop",
    "Hops",
    "RankShare",
    "RunError",
    "Sent",
    "Steps",
    "TensorParallel",
    "TensorParallelDecoder",
    "Watch",
    "World",
    "check_cover",
    "check_fit",
    "check_same",
    "check_shares",
    "connect",
    "even_split",
    "join_world",
    "local_device",
    "partition",
    "plan",
    "smallest_largest_share",
    "split_that_fits",
    "torchrun_store",
]
