"""What a call of an op takes at best on this GPU, by the measured limits of the benchmarks."""

import math

import torch

from fastshard.bench.limits import Limits
from fastshard.bench.timing import Stopwatch
from fastshard.ops._library import Cost

LEAST_BYTES = 2**20  # below, a kernel's start is what counts
WRITES_AS_MUCH = (
    *("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    *("act_and_mul", "silu_and_mul", "apply_rope", "rope_append"),
)
"""Ops that are held to the rate of a copy; the others read more than they write."""


class OpLimits:
    """Measures what it is asked for, each size of traffic once.

    Raises:
        torch.OutOfMemoryError: there is no room for the buffers, also of ``us``.
    """

    def __init__(self, device: torch.device):
        self._limits = Limits(device, Stopwatch(device, rounds=10, seconds=0.2))

    def us(self, op: str, cost: Cost) -> float:
        """Microseconds of a call: its traffic, its operations, or an empty kernel if that is more.

        The rate of the traffic is that of the power of two next to its size.
        """
        size = 2 ** round(math.log2(max(cost.bytes, LEAST_BYTES)))
        limits = self._limits
        traffic = limits.copy(size) if op in WRITES_AS_MUCH else limits.read(size)
        return max(cost.bytes / traffic.gbps / 1e3, limits.us("mma", 0, cost.flops), limits.node_us)
