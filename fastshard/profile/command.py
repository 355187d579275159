"""``fastshard profile``: run a command under ``torch.profiler``, and say where the time went."""

import gc
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastshard.profile import recorded, table
from fastshard.profile.ranges import ranges


def run(
    words: Sequence[str],
    run_command: Callable[[], int],
    *,
    trace: Path | None = None,
    sort: str = "time",
    say: Callable[[str], None],
) -> int:
    """Profile one command of fastshard; returns its status.

    Args:
        words: The command and its arguments.
        run_command: Runs it in this process.
        trace: Where to write a Chrome trace, with the ranges of layers.
        sort: One of ``table.SORTS``.
        say: Is given each line of the report.

    Raises:
        ValueError: the trace cannot be written; the command has not run then.
    """
    if trace is not None:
        check_writable(trace)
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_gpu
    with ranges(), torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        status = run_command()
        if has_gpu:
            torch.cuda.synchronize()
    recording = recorded.read(profiler.events())
    for line in _table(recording, sort):
        say(line)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
        say(f"trace: {trace} (for chrome://tracing or ui.perfetto.dev)")
    say("for a closer look:")
    for line in deeper_commands(words):
        say(f"  {line}")
    return status


def check_writable(path: Path) -> None:
    """Raise ValueError where ``path`` cannot be written; leaves no file behind."""
    is_there = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(
            f"--trace must be a file that can be written, got {path} ({error.strerror})"
        ) from None
    if not is_there:
        path.unlink()


def deeper_commands(words: Sequence[str]) -> list[str]:
    """Command lines of Nsight Systems and Nsight Compute for the same command."""
    command = shlex.join([sys.executable, "-m", "fastshard", *words])
    return [
        "FASTSHARD_NVTX=1 nsys profile --stats=true --trace=cuda,nvtx --cuda-graph-trace=node "
        f"--output=fastshard --force-overwrite=true {command}",
        "ncu --set full --graph-profiling node --kernel-name-base demangled "
        f"--kernel-name regex:fastshard:: --launch-count 20 --export fastshard {command}",
    ]


def _table(recording: recorded.Recording, sort: str) -> list[str]:
    """The table; without the limits, and a line that says why, where they cannot be measured."""
    if not recording.kernels:
        return list(table.lines(recording, sort=sort))
    if not recorded.RECORDS_DTYPES:
        missing = f"% limit: torch {torch.__version__} does not record the dtypes that it needs"
        return [*table.lines(recording, sort=sort), missing]
    from fastshard.profile.limits import OpLimits

    gc.collect()  # the command's model
    torch.cuda.empty_cache()
    try:
        limits = OpLimits(torch.device("cuda", torch.cuda.current_device()))
        return list(table.lines(recording, sort=sort, limit_us=limits.us))
    except torch.OutOfMemoryError:
        missing = "% limit: not measured, the GPU has no memory left for it"
        return [*table.lines(recording, sort=sort), missing]
