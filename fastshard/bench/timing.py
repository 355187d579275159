"""Timing on a GPU: cold caches, medians, and all variants of a case in turn.

Two kinds of run. ``GraphRun`` is for kernels of microseconds: a CUDA graph whose nodes walk over
several sets of inputs, together ``COLD_FACTOR`` times the L2, so that each node finds its inputs in
global memory; a node costs the time of the replay over their number, gaps included, and the few
microseconds that events add are spread over all. ``BurstRun`` is for whole steps, which read more
than the L2 holds: some calls in a row as the host issues them, so that a variant that waits for the
host shows it. In front of either the L2 is filled by reading something else (written lines would go
to memory in the timed region), and the device waits for the host to get ahead.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

COLD_FACTOR = 6  # of random replacement this leaves 0.3 % of the reads in the cache
REPLAY_BYTES = 2 * 10**9  # read by one replay: the events around it are then noise
MAX_NODES = 256
BURST_SECONDS = 0.01
HEAD_START_CYCLES = 400_000  # 0.2 ms, in which the host enqueues the events and a graph

Key = TypeVar("Key", bound=Hashable)
"""What a run is known by."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median of ``n`` runs, and the 20th and 80th percentile."""

    us: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Of ``samples`` in microseconds, at least one."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(statistics.median(ordered), p20, p80, len(ordered))


class Run(Protocol):
    """Work that can be enqueued again and again."""

    calls: int

    def __call__(self) -> None:
        """Enqueue ``calls`` calls on the current stream."""


class GraphRun:
    """A CUDA graph of ``calls`` calls; call ``i`` is given ``i``, to choose its inputs by."""

    def __init__(self, function: Callable[[int], object], calls: int):
        self.calls = calls
        self._function = function  # and with it the tensors whose addresses the graph holds
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up on first calls must not be captured
            for i in range(3):
                function(i)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(calls):
                function(i)

    def __call__(self) -> None:
        self._graph.replay()


class BurstRun:
    """``calls`` calls as the host issues them: 2 to 8, about ``BURST_SECONDS`` long."""

    def __init__(self, function: Callable[[int], object]):
        self._function = function
        function(0)  # set up
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function(0)
        torch.cuda.synchronize()
        self.calls = num_calls(time.perf_counter() - begin)

    def __call__(self) -> None:
        for i in range(self.calls):
            self._function(i)


def num_sets(num_bytes: int, l2_bytes: int) -> int:
    """Sets of inputs of ``num_bytes`` each that together are ``COLD_FACTOR`` times the L2."""
    return max(1, -(-COLD_FACTOR * l2_bytes // num_bytes))


def num_nodes(num_bytes: int) -> int:
    """Nodes of a graph whose calls read ``num_bytes`` each: 4 to ``MAX_NODES``, 20 if small."""
    least = 20 if num_bytes < 10**8 else 4
    return max(least, min(MAX_NODES, REPLAY_BYTES // num_bytes))


def cold_sets(num_bytes: int, l2_bytes: int) -> tuple[int, int]:
    """Sets of inputs, and calls of a replay that walks over them: each call finds its set cold.

    Where even ``MAX_NODES`` sets are less than six times the L2, every call of a replay has its own
    set, and before the replay the L2 is filled with something else.
    """
    sets = min(num_sets(num_bytes, l2_bytes), MAX_NODES)
    return sets, max(sets, num_nodes(num_bytes))


def num_calls(seconds: float) -> int:
    """Calls of a burst, where one takes so long."""
    return max(2, min(8, round(BURST_SECONDS / seconds)))


class Stopwatch:
    """Times runs on one device.

    Args:
        device: CUDA device.
        rounds: At most this many runs of each variant; n of every timing.
        seconds: A case's variants together get about this long, but at least 5 rounds.
        warmup_seconds: Each variant runs this long before it is timed.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 50,
        seconds: float = 1.0,
        warmup_seconds: float = 0.05,
    ):
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._rounds, self._seconds, self._warmup = rounds, seconds, warmup_seconds
        self._other = torch.rand(self.l2_bytes, device=device)  # float32: four times the L2
        self._sum = torch.empty((), device=device)

    def measure(self, runs: Mapping[Key, Run], rounds: int | None = None) -> dict[Key, Timing]:
        """Time every run, in turn, several rounds: as many as there is time for, or ``rounds``."""
        total = sum(self._warm_up(run) for run in runs.values())
        rounds = rounds or max(5, min(self._rounds, int(self._seconds / max(total, 1e-9))))
        samples: dict[Key, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(self._once(run) / run.calls)
        return {name: Timing.of(values) for name, values in samples.items()}

    def _once(self, run: Run) -> float:
        """Microseconds between events around one run, out of a cold L2."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._other, 0, out=self._sum)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _warm_up(self, run: Run) -> float:
        """Run for the warm-up's time, twice at least; returns the seconds of the last run."""
        begin = time.perf_counter()
        runs = 0
        while runs < 2 or time.perf_counter() - begin < self._warmup:
            last = time.perf_counter()
            run()
            torch.cuda.synchronize()
            runs += 1
        return time.perf_counter() - last


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Memory that ``function`` takes at most on top of what is allocated; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def relative_error(out: Tensor, golden: Tensor) -> float:
    """``|out - golden| / |golden|`` over all elements; NaN where one is not finite.

    Args:
        out: Of any dtype.
        golden: Shape of ``out``, float64.
    """
    difference = torch.linalg.vector_norm(out.double() - golden)
    error = (difference / torch.linalg.vector_norm(golden)).item()
    return error if error < float("inf") else float("nan")
