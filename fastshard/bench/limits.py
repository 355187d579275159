"""What this device can do at best, measured in the same run: the 100 % of every figure.

Each case is held to one of three limits:

- ``read``: a plain reduction over as many bytes as the case reads, under the same timing (cold, in
  a graph, the node included): the fastest of several shapes of a Triton kernel and of PyTorch's own
  reduction.
- ``copy``: a copy that reads half as many bytes as the case moves and writes the other half, under
  the same timing: the faster of PyTorch's copy and an elementwise kernel.
- ``mma``: as many operations at the rate of ``mma.sync``, the instruction of compute capability 8.0
  and up. Where there is no Triton to issue it, the rate of PyTorch's matrix product.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastshard.bench.timing import GraphRun, Stopwatch, cold_sets, num_nodes, num_sets

MAX_READ_BYTES = 4 * 2**30  # the rate is the same from there on
COPY_BYTES = 2**30
MATMUL_SIZE = 8192
MMA_ROUNDS, MMA_THREADS, MMA_RESIDENT = 4000, 256, 2  # products in a row, a block, a multiprocessor
# int32 elements a load, loads at a time, warps, programs a multiprocessor (None: one round of all)
SHAPES = [
    (2048, 1, 4, None),
    (4096, 1, 8, None),
    (4096, 2, 4, None),
    (4096, 4, 8, None),
    (8192, 4, 8, None),
    (2048, 2, 4, 8),
    (4096, 2, 8, 4),
]

Reader = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class TrafficLimit:
    """The fastest plain read, or copy, that moves ``num_bytes``: time, rate, and by what."""

    num_bytes: int
    us: float
    gbps: float
    by: str


class Limits:
    """Measures limits on one device.

    Attributes:
        copy_gbps: Of a copy within the device, bytes read and bytes written.
        node_us: Of a node of a graph whose kernel does nothing.
        matmul_tflops: Of a square bfloat16 matrix product by PyTorch.
        mma_tflops: Of ``mma.sync`` on random bfloat16; None without Triton.
        missing: What could not be measured, and why.
    """

    def __init__(self, device: torch.device, stopwatch: Stopwatch):
        self._device, self._stopwatch = device, stopwatch
        self._reads: dict[int, TrafficLimit] = {}
        self._copies: dict[int, TrafficLimit] = {}
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._readers, self._nothing, self.missing = _readers(multiprocessors)
        source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device=device).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device) / 64).bfloat16()
        out = torch.empty_like(a)
        runs = {
            "copy": GraphRun(lambda i: target.copy_(source), 2),
            "copy by a kernel": GraphRun(lambda i: torch.bitwise_not(source, out=target), 2),
            "node": GraphRun(lambda i: self._nothing(target), 200),
            "matmul": GraphRun(lambda i: torch.mm(a, b, out=out), 2),
        }
        times = {name: timing.us for name, timing in stopwatch.measure(runs).items()}
        self.copy_gbps = 2 * COPY_BYTES / min(times["copy"], times["copy by a kernel"]) / 1e3
        self.node_us = times["node"]
        self.matmul_tflops = 2 * MATMUL_SIZE**3 / times["matmul"] / 1e6
        self.mma_tflops = self._measure_mma(MMA_RESIDENT * multiprocessors)

    def us(self, limit: str, num_bytes: int, flops: int) -> float:
        """Microseconds that a case takes at best by its ``limit``: read, copy or mma.

        Raises:
            ValueError: there is no such limit.
        """
        if limit == "read":
            return self.read(num_bytes).us
        if limit == "copy":
            return self.copy(num_bytes).us
        if limit == "mma":
            return flops / (self.mma_tflops or self.matmul_tflops) / 1e6
        raise ValueError(f"limit must be one of read, copy, mma, got {limit!r}")

    def read(self, num_bytes: int) -> TrafficLimit:
        """The limit of reading ``num_bytes``, measured once for sizes within 2 %."""
        return _known(self._reads, num_bytes, self._measure_read)

    def copy(self, num_bytes: int) -> TrafficLimit:
        """The limit of reading and writing half of ``num_bytes`` each, measured as ``read``."""
        return _known(self._copies, num_bytes, self._measure_copy)

    def describe(self) -> dict:
        """All that was measured, as plain values."""
        return {
            "copy_gbps": self.copy_gbps,
            "graph_node_us": self.node_us,
            "matmul_tflops": self.matmul_tflops,
            "mma_tflops": self.mma_tflops,
            "read": [asdict(self._reads[size]) for size in sorted(self._reads)],
            "copy": [asdict(self._copies[size]) for size in sorted(self._copies)],
            "missing": self.missing,
        }

    def _measure_read(self, num_bytes: int) -> TrafficLimit:
        size = min(num_bytes, MAX_READ_BYTES, torch.cuda.mem_get_info(self._device)[0] // 2)
        sets = num_sets(size, self._stopwatch.l2_bytes)
        size -= size % 64  # whole vectors
        arena = torch.empty(sets * size // 4, dtype=torch.int32, device=self._device).random_()
        parts = arena.view(sets, -1).unbind()
        sums = torch.empty(size // 4 // 2048 + 4096, dtype=torch.int32, device=self._device)
        calls = max(sets, num_nodes(size))
        runs = {}
        for name, read in list(self._readers.items()):
            try:
                runs[name] = GraphRun(lambda i, read=read: read(parts[i % sets], sums), calls)
            except Exception as error:  # a compiler that fails; one way to read is left
                self.missing.append(f"{name}: {' '.join(str(error).split())[:200]}")
                del self._readers[name]
        times = self._stopwatch.measure(runs)
        by = min(times, key=lambda name: times[name].us)
        return TrafficLimit(
            num_bytes, times[by].us * num_bytes / size, size / times[by].us / 1e3, by
        )

    def _measure_copy(self, num_bytes: int) -> TrafficLimit:
        free = torch.cuda.mem_get_info(self._device)[0]
        size = max(16, min(num_bytes, 2 * COPY_BYTES, free // 2) // 2 // 16 * 16)
        sets, calls = cold_sets(2 * size, self._stopwatch.l2_bytes)
        source = torch.empty(sets, size // 4, dtype=torch.int32, device=self._device).random_()
        target = torch.empty_like(source)
        runs = {
            "torch copy": GraphRun(lambda i: target[i % sets].copy_(source[i % sets]), calls),
            "torch bitwise_not": GraphRun(
                lambda i: torch.bitwise_not(source[i % sets], out=target[i % sets]), calls
            ),
        }
        times = self._stopwatch.measure(runs)
        by = min(times, key=lambda name: times[name].us)
        us = times[by].us
        return TrafficLimit(num_bytes, us * num_bytes / (2 * size), 2 * size / us / 1e3, by)

    def _measure_mma(self, num_programs: int) -> float | None:
        """TFLOP/s of ``mma.sync``, or None."""
        try:
            from fastshard.bench import mma_kernel

            words = torch.randn(6, 2 * MMA_THREADS, device=self._device).bfloat16()
            words = words.view(torch.int32)
            sums = torch.empty(num_programs, MMA_THREADS, device=self._device)
            multiply = partial(mma_kernel.multiply, words, sums, MMA_ROUNDS, num_programs)
            flops = multiply()
            runs = {"mma": GraphRun(lambda i: multiply(), 4)}
            return flops / self._stopwatch.measure(runs)["mma"].us / 1e6
        except Exception as error:  # no Triton, or a compiler that fails
            reason = " ".join(str(error).split())[:200]
            self.missing.append(f"mma.sync: {reason}; PyTorch's matmul is the mma limit")
            return None


def _known(
    limits: dict[int, TrafficLimit], num_bytes: int, measure: Callable[[int], TrafficLimit]
) -> TrafficLimit:
    """The limit of ``num_bytes``: of a size within 2 % that is in ``limits``, or measured."""
    for size, limit in limits.items():
        if abs(size - num_bytes) <= 0.02 * num_bytes:
            return replace(limit, num_bytes=num_bytes, us=num_bytes / limit.gbps / 1e3)
    limits[num_bytes] = measure(num_bytes)
    return limits[num_bytes]


def _readers(
    multiprocessors: int,
) -> tuple[dict[str, Reader], Callable[[Tensor], object], list[str]]:
    """Ways to read a buffer, a kernel that does nothing, and what is missing and why."""
    readers: dict[str, Reader] = {"torch.sum": lambda x, sums: x.view(torch.float32).sum()}
    try:
        from fastshard.bench import read_kernel
    except ImportError as error:
        missing = [f"the Triton read kernel: {error}; PyTorch's reduction is the read limit"]
        return readers, lambda x: x[:1].add_(1), missing
    for block, blocks, warps, resident in SHAPES:
        programs = resident and resident * multiprocessors
        name = f"triton {block}x{blocks}, {warps} warps, {programs or 'all'} programs"
        readers[name] = partial(
            read_kernel.read, block=block, blocks=blocks, num_warps=warps, num_programs=programs
        )
    return readers, read_kernel.nothing, []
