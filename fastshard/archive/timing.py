"""Timing a function whose answers are checked: fresh inputs for each round, some of them known.

A kernel may tell a check from a timing, and be right in the one and idle in the other. So every
timed round has inputs that no round had before, at the same addresses; in some of them, which the
asking process picks, these are contents whose answers are known, and the answers are kept.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastshard.archive import trees
from fastshard.bench.limits import Limits
from fastshard.bench.timing import Stopwatch, Timing

SETS = 4
"""Copies of the inputs that one round walks over, each cold; one where they are large."""
LARGE_BYTES = 2**29
READ_BYTES = 2**30


class FreshCalls:
    """Calls of a function on sets of inputs that change before each round.

    Args:
        function: Of a content's arguments.
        contents: Of the same shapes, on the CPU.
        device: Where it runs.
        known: Round -> number of the content that it has unchanged.

    Attributes:
        calls: Of one round.
        answers: Number of a content -> tensors that the function answered, of its known round.
    """

    def __init__(
        self,
        function: Callable[..., object],
        contents: Sequence[trees.Packed],
        device: torch.device,
        known: Mapping[int, int],
    ):
        self._function, self._known = function, known
        self._contents = [[b.to(device) for b in content.buffers] for content in contents]
        size = sum(buffer.nbytes for buffer in self._contents[0])
        self.calls = SETS if size < LARGE_BYTES else 1
        copies = [[b.clone() for b in self._contents[0]] for _ in range(self.calls)]
        self._sets = [trees.Packed(contents[0].tree, buffers) for buffers in copies]
        self._arguments = [packed.value() for packed in self._sets]
        self._outs: list[object] = [None] * self.calls
        self._round = -1
        self.answers: dict[int, list[Tensor]] = {}

    def prepare(self) -> None:
        """Keep what the last round answered, where that is known; fill in the next's inputs."""
        self.keep()
        self._round += 1
        content = self._known.get(self._round)
        source = self._contents[self._round % len(self._contents) if content is None else content]
        for i, packed in enumerate(self._sets):
            for buffer, fresh in zip(packed.buffers, source, strict=True):
                buffer.copy_(fresh)
                if content is None and buffer.is_floating_point():
                    buffer.mul_(1 + (1 + (self._round * SETS + i) % 97) / 128)

    def __call__(self) -> None:
        for i, arguments in enumerate(self._arguments):
            self._outs[i] = self._function(*arguments)

    def keep(self) -> None:
        """Keep what the last round answered, where that is known."""
        content = self._known.get(self._round)
        if content is not None:
            outs = trees.tensors_of(self._outs[self._round % self.calls])
            self.answers[content] = [out.detach().clone() for out in outs]


class GpuClock(Stopwatch):
    """As the benchmarks time, with fresh inputs before each round."""

    def _once(self, run: FreshCalls) -> float:
        run.prepare()
        return super()._once(run)


class HostClock:
    """For a CPU: the same, by the host's clock and without cold caches."""

    def measure(self, runs: Mapping[str, FreshCalls], rounds: int) -> dict[str, Timing]:
        """Time every run, in turn, ``rounds`` times."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                run.prepare()
                begin = time.perf_counter()
                run()
                samples[name].append((time.perf_counter() - begin) * 1e6 / run.calls)
        return {name: Timing.of(values) for name, values in samples.items()}


def clock_of(device: torch.device) -> HostClock | GpuClock:
    """What times on a device."""
    return GpuClock(device) if device.type == "cuda" else HostClock()


def wait(device: torch.device) -> None:
    """For everything that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(request: dict) -> Iterator[dict]:
    """What the device can do at best, of a process that runs nothing foreign.

    Args:
        request: ``device``.
    """
    device = torch.device(request["device"])
    if device.type == "cuda":
        stopwatch = Stopwatch(device)
        limits = Limits(device, stopwatch)
        found = {
            "gbps": limits.read(READ_BYTES).gbps,
            "tflops": max(limits.matmul_tflops, limits.mma_tflops or 0),
            "cache_bytes": stopwatch.l2_bytes,
        }
    else:
        found = {"gbps": _copy_gbps(), "tflops": _matmul_tflops(), "cache_bytes": 0}
    yield found


def _copy_gbps() -> float:
    """Of the CPU's caches and memory, whichever is fastest."""
    best = 0.0
    for size in (2**14, 2**18, 2**24):
        source, target = torch.ones(2, size // 4)
        best = max(best, 2 * size / _least_us(lambda s=source, t=target: t.copy_(s)) / 1e3)
    return best


def _matmul_tflops() -> float:
    a, out = torch.ones(512, 512), torch.empty(512, 512)
    return 2 * 512**3 / _least_us(lambda: torch.mm(a, a, out=out)) / 1e6


def _least_us(function: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(10):
            function()
        times.append((time.perf_counter() - begin) * 1e5)
    return min(times)
