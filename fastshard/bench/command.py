"""``fastshard bench``: measure the limits, then one line a variant, then the JSON."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastshard.bench import (
    adapters,
    attention,
    decode,
    kernels,
    linear,
    load,
    mlp,
    norm,
    plot,
    prefill,
    ranks,
    report,
    start,
)
from fastshard.bench.case import Bench, Problem, Settings, run_case
from fastshard.bench.limits import Limits
from fastshard.bench.presets import preset
from fastshard.bench.result_file import ResultFile
from fastshard.bench.timing import Stopwatch
from fastshard.devices import check_device

BENCHMARKS: dict[str, Callable[[Bench], Iterator[Problem]]] = {
    "attention": attention.problems,
    "linear": linear.problems,
    "mlp": mlp.problems,
    "norm": norm.problems,
    "prefill": prefill.problems,
    "decode": decode.problems,
}
PROCESSES = {"start": start, "load": load, "adapters": adapters, "ranks": ranks}
"""Benchmarks that measure processes of their own."""
NAMES = (*BENCHMARKS, *PROCESSES)
"""In the order in which they run."""


def run(
    names: Sequence[str],
    settings: Settings,
    *,
    command: Sequence[str] = (),
    json_path: Path | None = None,
    plot_path: Path | None = None,
    time_limit: float | None = None,
    rounds: int = 50,
    say: Callable[[str], None] = print,
) -> None:
    """Run benchmarks on the current GPU.

    Args:
        names: Of ``NAMES``.
        settings: What to run; its deadline is set here.
        command: For the JSON.
        json_path: Written after each result.
        plot_path: Written at the end.
        time_limit: Seconds after which no peer is compiled any more.
        rounds: At most this many samples a variant.
        say: Is given each line.

    Raises:
        ValueError: a model does not exist, or has not that many layers or positions; or the plot
            is of no known format.
        RuntimeError: there is no GPU that this build serves, or no matplotlib for the plot.
    """
    if plot_path is not None:
        plot.check(plot_path)
    for name in settings.models or ():
        preset(
            name,
            num_layers=settings.num_layers,
            max_seq_len=settings.contexts and max(settings.contexts),
        )
    device = _current_gpu()
    begin = time.monotonic()
    if time_limit is not None:
        settings = replace(settings, deadline=begin + time_limit)
    stopwatch = Stopwatch(device, rounds=rounds)
    limits = Limits(device, stopwatch)
    environment = report.describe_environment(device)
    for line in report.introduction(environment, limits.describe()):
        say(line)
    bench = Bench(device, stopwatch, limits, settings)
    compiled = kernels.describe(names, settings.dtype)
    found: list[report.Line | report.Skipped] = []
    processes: dict[str, list[dict]] = {name: [] for name in PROCESSES}

    def keep(name: str, result: report.Line | report.Skipped | dict) -> None:
        if isinstance(result, dict):
            processes[name].append(result)
            say(PROCESSES[name].text(result))
        else:
            found.append(result)
            say(result.text())
        if json_path is not None:  # each time: what was measured before a failure is not lost
            report.write_json(
                json_path,
                command=command,
                environment=environment,
                limits=limits.describe(),
                compiled=compiled,
                results=found,
                processes=processes,
            )

    for name in sorted(set(names), key=NAMES.index):
        if name in PROCESSES:
            measured = PROCESSES[name].run(settings)
        else:
            say(report.HEADER)
            measured = _results(BENCHMARKS[name](bench), bench)
        for result in measured:
            keep(name, result)
    lines = [result for result in found if isinstance(result, report.Line)]
    if plot_path is not None and lines:
        measured = ResultFile(plot_path, list(command), environment, limits.describe(), lines)
        plot.write([measured], plot_path)
    for line in report.traffic_limits(limits.describe()):
        say(line)
    for line in kernels.lines(compiled):
        say(line)
    say(f"{time.monotonic() - begin:.0f} s in all; {report.NOTE}")


def _results(problems: Iterable[Problem], bench: Bench) -> Iterator[report.Line | report.Skipped]:
    """Run one case after the other; gives the device's memory back in between."""
    for problem in problems:
        try:
            for case in problem.cases():
                yield from run_case(case, bench)
                del case
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())[:200]
            yield report.Skipped(problem.name, "all", problem.shape, reason)
        gc.collect()
        torch.cuda.empty_cache()


def _current_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"bench measures on a GPU, and torch {torch.__version__} sees none; "
            "without one, fastshard info says what is installed"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    check_device(device)
    return device
