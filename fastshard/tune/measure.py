"""Measuring on a GPU: asks the measuring process, and judges what it saw.

The rules, in their order: a variant is correct on inputs of several shapes, or its time does not
count; it is timed in turns with ``AUTO``, out of cold caches; a time below what the device can do
is an error of measuring; what it prepares for each new shape must pay.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastshard.devices import check_device
from fastshard.tune.observe import is_accurate
from fastshard.tune.problem import AUTO, Measurement, Problem, rejected
from fastshard.tune.worker import Worker, WorkerFailed

TIMEOUT = 120.0  # seconds; the first answer waits for what the driver compiles
LIMIT_NOISE = 0.05  # that a time may lie below the measured limit
PREPARATION_US = 2000.0  # per new shape, that is not asked about
PAYING_CALLS = 64  # in which more must be won back: one prompt of the largest presets

Library = Callable[[Problem, str], Path | None]


@dataclass
class Observation:
    """What was seen of one variant.

    Attributes:
        errors: Of each checked shape, ours and eager PyTorch's; None where not finite.
        preparation_us: That a call of a new shape takes longer than the next.
        failure: What it raised, or how the process ended.
        timing: Median, 20th and 80th percentile in microseconds.
        auto_us: Median of ``AUTO`` in the same rounds.
        limit_us: Least time by bytes and FLOPs.
    """

    errors: Sequence[Sequence[float | None]] = ()
    preparation_us: float = 0.0
    failure: str | None = None
    timing: tuple[float, float, float] | None = None
    auto_us: float | None = None
    limit_us: float | None = None


def judge(seen: Observation, seconds: float) -> Measurement:
    """Whether the variant may be chosen, and why not."""
    if seen.failure is not None:
        return rejected(seen.failure, seconds)
    for error, eager_error in seen.errors:
        if error is None or eager_error is None or not is_accurate(error, eager_error):
            text = f"error {_number(error)}, eager {_number(eager_error)}: at most twice that"
            return rejected(text, seconds, error)
    if not seen.errors or seen.timing is None or seen.auto_us is None or seen.limit_us is None:
        return rejected("not timed", seconds)
    us, p20, p80 = seen.timing
    error = max(error for error, _ in seen.errors)
    if us < seen.limit_us * (1 - LIMIT_NOISE):
        text = f"{us:.2f} us, less than the {seen.limit_us:.2f} us that the device takes at least"
        return rejected(f"{text}: an error of measuring", seconds, error)
    gain = seen.auto_us - us
    if seen.preparation_us > PREPARATION_US and seen.preparation_us > gain * PAYING_CALLS:
        text = f"prepares {seen.preparation_us / 1e3:.0f} ms for each new shape"
        calls = f"won back in {seen.preparation_us / gain:.0f} calls" if gain > 0 else "never won"
        return rejected(f"{text}, {calls}: at most {PAYING_CALLS}", seconds, error)
    return Measurement(us, p20, p80, seen.auto_us, seen.limit_us, error, None, seconds)


class GpuMeasurer:
    """Measures on the current GPU, in a process of its own; a context manager.

    Args:
        seed: Of the inputs; every request gets others.
        timeout: Seconds without a sign of life after which a variant counts as hanging.
        target: The function that the process answers by.
        library: Where a variant that is not in the menu is compiled; None for others.
        environment: Of the process; by default this one's.

    Raises:
        RuntimeError: there is no GPU, or none that this build serves.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        timeout: float = TIMEOUT,
        target: str = "fastshard.tune.observe:observe",
        library: Library = lambda problem, variant: None,
        environment: dict[str, str] | None = None,
    ):
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"tune measures on a GPU, and torch {torch.__version__} sees none; without one, "
                "--replay --study FILE searches what another run measured"
            )
        device = torch.device("cuda", torch.cuda.current_device())
        check_device(device)
        self.device = torch.cuda.get_device_name(device)
        self._asker = Asker(
            target, seed=seed, timeout=timeout, library=library, environment=environment
        )

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        return self._asker(problem, variants)

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        """As the protocol has it; the process of one confirmation serves the next too."""
        return self._asker.confirm(problem, variant)

    def __enter__(self) -> "GpuMeasurer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the measuring process."""
        self._asker.close()


class Asker:
    """The measurer without its GPU: asks, goes on after failures, judges.

    Args:
        target: Of ``Worker``.
        seed: Of the inputs.
        timeout: Of ``Worker``.
        environment: Of ``Worker``.
        library: As ``GpuMeasurer`` takes it.
    """

    def __init__(
        self,
        target: str,
        *,
        seed: int,
        timeout: float,
        environment: dict[str, str] | None = None,
        library: Library = lambda problem, variant: None,
    ):
        settings = {"timeout": timeout, "environment": environment}
        self._worker, self._fresh = Worker(target, **settings), Worker(target, **settings)
        self._is_confirming = False
        self._library = library
        self._seed = seed * 1_000_003

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        self._is_confirming = False
        return self._ask(self._worker, problem, variants)

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        if not self._is_confirming:  # a process that has run nothing but what was chosen
            self.close()
            self._is_confirming = True
        return self._ask(self._fresh, problem, [variant])[0]

    def close(self) -> None:
        self._worker.close()
        self._fresh.close()

    def _ask(self, worker: Worker, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        begin = time.perf_counter()
        seen = {name: Observation() for name in variants}
        waiting = list(variants)
        while waiting:
            failed = self._ask_once(worker, problem, waiting, seen)
            if failed is None:
                break
            variant, reason = failed
            # Alone, a variant that failed while others were timed beside it fails again.
            if variant in waiting:
                seen[variant].failure = reason
                waiting.remove(variant)
            elif variant == AUTO or len(waiting) == 1:
                for name in waiting:
                    seen[name].failure = reason
                break
            else:
                seconds = time.perf_counter() - begin
                rest = [name for name in waiting if seen[name].failure is None]
                alone = {name: self._ask(worker, problem, [name])[0] for name in rest}
                judged = {name: judge(seen[name], seconds) for name in variants}
                return [alone.get(name) or judged[name] for name in variants]
        seconds = (time.perf_counter() - begin) / max(len(variants), 1)
        return [judge(seen[name], seconds) for name in variants]

    def _ask_once(
        self,
        worker: Worker,
        problem: Problem,
        variants: Sequence[str],
        seen: dict[str, Observation],
    ) -> tuple[str, str] | None:
        """Fill ``seen``; returns at whom the process failed, and how."""
        self._seed += 10
        running = AUTO
        libraries = {name: self._library(problem, name) for name in variants}
        request = {
            "op": problem.op,
            "dtype": problem.dtype,
            "shape": problem.shape,
            "variants": list(variants),
            "seed": self._seed,
            "libraries": {name: str(path) for name, path in libraries.items() if path is not None},
        }
        try:
            for message in worker.ask(request):
                running = message.get("begins", running)
                if "timings" in message:
                    auto_us = message["timings"][AUTO][0]
                    for name in set(variants) & message["timings"].keys():
                        seen[name].timing = tuple(message["timings"][name])
                        seen[name].auto_us, seen[name].limit_us = auto_us, message["limit_us"]
                elif message.get("variant") in seen:
                    of = seen[message["variant"]]
                    of.failure = message.get("failure")
                    of.errors = message.get("errors", ())
                    of.preparation_us = message.get("preparation_us", 0.0)
        except WorkerFailed as error:
            return running, str(error)
        return None


def _number(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
