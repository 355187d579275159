"""A case and its variants: checked against float64, then timed in turn."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastshard.bench.limits import Limits
from fastshard.bench.report import Line, Skipped
from fastshard.bench.timing import (
    MAX_NODES,
    GraphRun,
    Run,
    Stopwatch,
    cold_sets,
    peak_bytes,
    relative_error,
)

PEERS = ("eager", "compile", "autotune", "sdpa", "torchtune")
MODES = ("persistent", "graph", "eager")

Call = Callable[[int], Tensor]
"""One call on the inputs of this index; the output of a variant's index 0 is checked."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: As printed.
        prepare: Returns the call, or raises where this variant cannot be had.
        is_peer: Not our own.
    """

    name: str
    prepare: Callable[[], Call]
    is_peer: bool = True


@dataclass(frozen=True)
class Case:
    """One problem of fixed shape.

    Attributes:
        name: The benchmark it belongs to.
        shape: As printed.
        dtype: Of inputs and outputs.
        num_bytes: Least global memory traffic of one call.
        flops: Of one call.
        golden: Computes what index 0 should give, in float64.
        variants: Our own first.
        make_run: Makes a run of a call.
        baseline: The variant whose error stands beside those of the others.
        compared: Turns an output into what is compared with ``golden``.
        limit: What times are held to: read, copy or mma, as in ``Limits``.
        memory_goal: Bytes that a call may take beside its inputs; where given, they are measured.
    """

    name: str
    shape: str
    dtype: torch.dtype
    num_bytes: int
    flops: int
    golden: Callable[[], Tensor]
    variants: list[Variant]
    make_run: Callable[[Call], Run]
    baseline: str = "torch eager"
    compared: Callable[[Tensor], Tensor] = lambda out: out
    limit: str = "read"
    memory_goal: int | None = None


@dataclass(frozen=True)
class Problem:
    """A shape of a benchmark, before anything is allocated for it.

    Attributes:
        name: The benchmark it belongs to.
        shape: As printed.
        cases: Makes its cases; the next one is asked for when the one before was run.
    """

    name: str
    shape: str
    cases: Callable[[], Iterable[Case]]


class Unavailable(Exception):
    """Raised by ``prepare``: this variant is not run, and why."""


@dataclass(frozen=True)
class Settings:
    """What to run; None is a benchmark's own choice.

    Attributes:
        models: Presets.
        batches: Batch sizes, or rows.
        contexts: Keys in the cache.
        modes: Our ways to decode.
        peers: Of ``PEERS``.
        compiles_all: Compile peers also where it takes minutes.
        dtype: Of weights and activations.
        num_layers: Of every model; None: all.
        ranks: GPUs of ``bench ranks``.
        deadline: On the clock of ``time.monotonic``: nothing is compiled from then on.
    """

    models: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = ("eager", "compile", "sdpa")
    compiles_all: bool = False
    dtype: torch.dtype = torch.bfloat16
    num_layers: int | None = None
    ranks: tuple[int, ...] | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class Bench:
    """Where and how to measure, and what."""

    device: torch.device
    stopwatch: Stopwatch
    limits: Limits
    settings: Settings

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random values, of the settings' dtype."""
        values = torch.empty(shape, device=self.device, dtype=self.settings.dtype)
        return values.normal_(std=scale)

    def cold_graphs(self, num_bytes: int) -> tuple[int, Callable[[Call], Run]]:
        """How many sets of inputs a case of kernels needs, and its ``make_run``."""
        sets, calls = cold_sets(num_bytes, self.stopwatch.l2_bytes)
        return sets, lambda call: GraphRun(lambda i: call(i % sets), calls)

    def hot_graph(self, call: Call) -> Run:
        """A run whose calls all take the inputs of index 0, from the L2."""
        return GraphRun(lambda i: call(0), MAX_NODES)

    def peers(self, prepare: Mapping[str, Callable[[], Call]]) -> list[Variant]:
        """A variant for each peer that was asked for, by its name in ``PEERS``."""
        asked = self.settings.peers
        return [
            Variant(name if name == "torchtune" else f"torch {name}", prepare[name])
            for name in prepare
            if name in asked
        ]

    def compiled(self, function: Callable, **settings) -> Callable:
        """``torch.compile`` of ``function`` alone: fixed shapes, one graph, no earlier one kept.

        Raises:
            Unavailable: the deadline has passed.
        """
        if time.monotonic() > self.settings.deadline:
            raise Unavailable("the time limit has passed, nothing more is compiled")
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, fullgraph=True, **settings)


def run_case(case: Case, bench: Bench) -> Iterator[Line | Skipped]:
    """Check and time every variant of ``case``."""
    limit_us = bench.limits.us(case.limit, case.num_bytes, case.flops)
    golden = case.golden()
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    seconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    skipped = []
    for variant in case.variants:
        begin = time.perf_counter()
        try:
            call = variant.prepare()
            errors[variant.name] = relative_error(
                case.compared(call(0)), golden
            )  # waits for the device
            seconds[variant.name] = time.perf_counter() - begin
            if case.memory_goal is not None:
                # 0: a CUDA graph has memory of its own
                peaks[variant.name] = peak_bytes(partial(call, 0), bench.device) or None
            runs[variant.name] = case.make_run(call)
        except Unavailable as error:
            skipped.append(Skipped(case.name, variant.name, case.shape, str(error)))
        except Exception as error:  # a peer may fail in any way; that is a result too
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            skipped.append(Skipped(case.name, variant.name, case.shape, text))
    del golden
    timings = bench.stopwatch.measure(runs)
    peers = [timings[v.name].us for v in case.variants if v.is_peer and v.name in timings]
    for variant in case.variants:
        if variant.name in timings:
            yield Line(
                case=case.name,
                variant=variant.name,
                is_peer=variant.is_peer,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                timing=timings[variant.name],
                num_bytes=case.num_bytes,
                flops=case.flops,
                limit_us=limit_us,
                best_peer_us=min(peers, default=None),
                error=errors[variant.name],
                eager_error=errors.get(case.baseline),
                first_call_seconds=seconds[variant.name],
                limit=case.limit,
                peak_bytes=peaks.get(variant.name),
                memory_goal=case.memory_goal,
            )
    yield from skipped
