"""What a benchmark found: lines for a reader, JSON for programs."""

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastshard
from fastshard import build_record
from fastshard.bench.timing import Timing
from fastshard.devices import loaded_code
from fastshard.files import replace_text

HEADER = (
    f"{'case':<10} {'variant':<20} {'shape':<36} {'dtype':<8} {'time':>10} {'p20-p80':>15} "
    f"{'n':>3} {'GB/s':>5} {'TFLOP/s':>7} {'% limit':>7} {'x peer':>6} {'error':>8} {'(eager)':>9}"
)

NOTE = (
    "% limit: of the fastest plain read, or for norms copy, of as many bytes, as above, under the "
    "same timing, for prefill of the rate of mma.sync; x peer: times as fast as the best peer; "
    "error: relative to float64, (eager PyTorch's)"
)


@dataclass(frozen=True)
class Line:
    """One variant of a case.

    Attributes:
        case: Name of the benchmark.
        variant: Name of the variant.
        is_peer: Not our own.
        shape: Of the problem.
        dtype: Of inputs and outputs.
        timing: Of one call.
        num_bytes: Least global memory traffic of one call.
        flops: Of one call.
        limit_us: What the case takes at best by its limit.
        best_peer_us: None where no peer ran.
        error: Relative to float64.
        eager_error: That of eager PyTorch in the same dtype; None where it did not run.
        first_call_seconds: Of the preparation, with compilers, and one call.
        limit: Which one that is: read, copy or mma.
        peak_bytes: Most memory that a call took beside its inputs; None where not measured.
        memory_goal: What it should take at most; None where there is no goal.
    """

    case: str
    variant: str
    is_peer: bool
    shape: str
    dtype: str
    timing: Timing
    num_bytes: int
    flops: int
    limit_us: float
    best_peer_us: float | None
    error: float
    eager_error: float | None
    first_call_seconds: float
    limit: str = "read"
    peak_bytes: int | None = None
    memory_goal: int | None = None

    @property
    def gbps(self) -> float:
        return self.num_bytes / self.timing.us / 1e3

    @property
    def tflops(self) -> float:
        return self.flops / self.timing.us / 1e6

    @property
    def percent_of_limit(self) -> float:
        return 100 * self.limit_us / self.timing.us

    @property
    def times_best_peer(self) -> float | None:
        """How many times faster than the best peer."""
        return None if self.best_peer_us is None else self.best_peer_us / self.timing.us

    def text(self) -> str:
        """One aligned line."""
        timing, ratio = self.timing, self.times_best_peer
        first = self.first_call_seconds
        return (
            f"{self.case:<10} {self.variant:<20} {self.shape:<36} {self.dtype:<8} "
            f"{format_us(timing.us):>10} {format_range(timing):>15} {timing.n:>3} "
            f"{self.gbps:>5.0f} {self.tflops:>7.2f} {self.percent_of_limit:>6.1f}% "
            f"{'-' if ratio is None else f'{ratio:.2f}':>6} {self.error:>8.1e} "
            f"{'-' if self.eager_error is None else f'({self.eager_error:.1e})':>9}"
            f"{f'  first call {first:.1f} s' if first >= 1 else ''}{self._memory_text()}"
        )

    def _memory_text(self) -> str:
        if self.peak_bytes is None:
            return ""
        goal = "" if self.memory_goal is None else f" (goal {self.memory_goal / 1e6:.1f})"
        return f"  peak {self.peak_bytes / 1e6:.1f} MB{goal}"

    def to_dict(self) -> dict:
        """Plain values, what is derived included; an error that is no number is None."""
        derived = {
            "error": self.error if math.isfinite(self.error) else None,
            "gbps": self.gbps,
            "tflops": self.tflops,
            "percent_of_limit": self.percent_of_limit,
            "times_best_peer": self.times_best_peer,
        }
        return asdict(self) | derived


@dataclass(frozen=True)
class Skipped:
    """A variant of a case that gave no figure, and why."""

    case: str
    variant: str
    shape: str
    reason: str

    def text(self) -> str:
        """One line, aligned with those of ``Line``."""
        return f"{self.case:<10} {self.variant:<20} {self.shape:<36} none: {self.reason}"


def format_us(us: float) -> str:
    """Microseconds, or milliseconds from a thousand up."""
    return f"{us:.2f} us" if us < 1e3 else f"{us / 1e3:.3f} ms"


def format_range(timing: Timing) -> str:
    """The percentiles, in the unit that ``format_us`` gives the median."""
    digits, unit = (2, 1.0) if timing.us < 1e3 else (3, 1e3)
    return f"{timing.p20 / unit:.{digits}f}-{timing.p80 / unit:.{digits}f}"


def describe_environment(device: torch.device) -> dict:
    """Device, clocks, driver and versions, as plain values."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "code": loaded_code(build_record.CUDA_ARCHS, capability),
        "architectures": build_record.CUDA_ARCHS,
        **_clocks(),
        "fastshard": fastshard.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def introduction(environment: dict, limits: dict) -> list[str]:
    """Lines on the device and its limits, to stand above the results."""
    clock, mma = environment.get("clocks.sm", "unknown clock"), limits["mma_tflops"]
    return [
        f"{environment['device']}, {environment['multiprocessors']} multiprocessors, {clock}, "
        f"driver {environment.get('driver_version', 'unknown')}",
        f"fastshard {environment['fastshard']} ({environment['code']}), "
        f"torch {environment['torch']}, cuDNN {environment['cudnn']}, "
        f"triton {environment['triton'] or 'missing'}",
        f"limits: copy {limits['copy_gbps']:.0f} GB/s, graph node {limits['graph_node_us']:.2f} us,"
        f" matmul {limits['matmul_tflops']:.0f} TFLOP/s, mma.sync "
        f"{'unknown' if mma is None else f'{mma:.0f} TFLOP/s'}; "
        "reads and copies as the cases need them",
        *(f"missing: {missing}" for missing in limits["missing"]),
    ]


def traffic_limits(limits: dict) -> list[str]:
    """A line for each size whose read or copy limit was measured."""
    return [
        f"{kind:<10} {limit['by']:<57} {limit['num_bytes'] / 1e6:>8.1f} MB "
        f"{format_us(limit['us']):>10} {limit['gbps']:>5.0f} GB/s"
        for kind in ("read", "copy")
        for limit in limits[kind]
    ]


def _clocks() -> dict:
    """Driver and clocks by ``nvidia-smi``, read while the device is warm; or why there are none."""
    keys = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "-i"]
    try:
        found = subprocess.run(
            [*command, str(torch.cuda.current_device())],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"unknown: {error}"}
    return dict(zip(keys, (value.strip() for value in found.stdout.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(
    path: Path,
    *,
    command: Sequence[str],
    environment: dict,
    limits: dict,
    compiled: dict,
    results: Sequence[Line | Skipped],
    processes: Mapping[str, list[dict]],
) -> None:
    """Write all of a run to ``path``, whole or not at all.

    Args:
        path: Written over.
        command: Words of the command line.
        environment: As ``describe_environment`` gives it.
        limits: Of ``Limits.describe``.
        compiled: Of ``kernels.describe``.
        results: Lines, and variants that gave none.
        processes: Of the benchmarks that measure processes of their own, plain values.
    """
    content = {
        "command": list(command),
        "environment": environment,
        "limits": limits,
        "machine_code": compiled,
        "lines": [result.to_dict() for result in results if isinstance(result, Line)],
        **processes,
        "skipped": [asdict(result) for result in results if isinstance(result, Skipped)],
    }
    replace_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
