"""Compiling instances outside the menu: from which sources, by which compiler, kept in the cache.

An instance that does not compile, or that needs more registers than there are, has a reason in the
place of a time, and is never chosen.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from fastshard.build_record import CUDA_ARCHS, source_version
from fastshard.tune import instances, menu, nvcc
from fastshard.tune.problem import Measurement, Measurer, Problem, rejected

TIMEOUT = 600.0
"""Seconds after which a compiler is killed; some of the largest tiles take one of them."""


def checkout(path: Path) -> Path:
    """The folder of the sources of the fastshard that is installed.

    Raises:
        ValueError: there are none, or those of another version.
    """
    project = path / "pyproject.toml"
    text = project.read_text() if project.is_file() else ""
    if '\nname = "fastshard"\n' not in text or not (path / "csrc").is_dir():
        raise ValueError(
            f"source must be a checkout of fastshard, which has csrc, got {path}: "
            "git clone it, and pass its folder"
        )
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    installed = source_version()
    if found is None or found[1] != installed:
        raise ValueError(
            f"source must be a checkout of fastshard {installed}, which is installed, "
            f"got one of {found and found[1]} in {path}"
        )
    return path.resolve()


class Compiler:
    """Compiles instances, some at a time, into a folder.

    Args:
        source: A checkout.
        folder: Of the libraries, by the content of all that goes into them.

    Raises:
        RuntimeError: there is no nvcc, or it does not run.
    """

    def __init__(self, source: Path, folder: Path):
        home = nvcc.find_cuda_home()
        if not nvcc.has_nvcc(home):
            raise RuntimeError(
                "a patch of the menu needs nvcc, to compile what is not in it, and there is none "
                f"(CUDA_HOME={home}): {nvcc.HOW_TO_GET_IT}"
            )
        try:
            release = nvcc.cuda_version(home)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{home / 'bin' / 'nvcc'} does not run: {error}") from None
        archs = CUDA_ARCHS or nvcc.DEFAULT_ARCHS
        self._command = [
            str(home / "bin" / "nvcc"),
            "-shared",
            *nvcc.flags(release),
            *nvcc.arch_flags(archs),
            f"-DFASTSHARD_CUDA_ARCHS={archs.replace(';', ' ')}",
            "--expt-relaxed-constexpr",
            "-Xptxas=-warn-spills,-warn-lmem-usage",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
            f"-I{source / 'csrc'}",
        ]
        self._source, self._folder = source, folder
        self._identity = hashlib.sha256(repr((release, self._command[1:-1])).encode())
        for path in sorted((source / "csrc").rglob("*")):
            if path.suffix in (".h", ".cuh"):
                self._identity.update(path.read_bytes())
        self._jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def library(self, problem: Problem, variant: str) -> Path | None:
        """Where the library of a variant is or will be; None for one of the menu."""
        if menu.has(problem.op, variant):
            return None
        digest = self._identity.copy()
        digest.update(instances.source(problem.op, problem.dtype, variant).encode())
        kernel = problem.op.removeprefix("add_")
        return self._folder / f"{kernel}-{variant}-{digest.hexdigest()[:24]}.so"

    def build(self, problem: Problem, variants: Sequence[str]) -> dict[str, str]:
        """Compile those that are not there yet; returns why some of them could not be."""
        outside = [name for name in variants if self.library(problem, name) is not None]
        with ThreadPoolExecutor(self._jobs) as pool:
            reasons = list(pool.map(lambda name: self._build(problem, name), outside))
        failed = zip(outside, reasons, strict=True)
        return {name: reason for name, reason in failed if reason is not None}

    def _build(self, problem: Problem, variant: str) -> str | None:
        library = self.library(problem, variant)
        if library.exists():
            return None
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            code, made = Path(folder) / "instance.cu", Path(folder) / "instance.so"
            code.write_text(instances.source(problem.op, problem.dtype, variant))
            command = [*self._command, str(code), "-o", str(made)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return f"nvcc took more than {TIMEOUT:g} s"
            said = (run.stdout + run.stderr).replace(f"{self._source}/", "")
            reason = why_unusable(run.returncode, said)
            if reason is None:
                os.replace(made, library)
        return reason


def why_unusable(status: int, output: str) -> str | None:
    """What speaks against an instance, by what the compiler said."""
    if status != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b", line)]
        said = (errors or lines or [f"status {status}"])[0]
        return f"does not compile: {said[-160:]}"
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    if found:
        return f"spills {max(int(stores) for stores, _ in found)} bytes of registers"
    found = re.findall(r"size of stack frame: (\d+) bytes", output)
    return f"needs {max(map(int, found))} bytes of local memory" if found else None


class CompilingMeasurer:
    """Measures by another measurer what ``compiler`` could compile, and the menu.

    Args:
        measurer: Finds the libraries by ``compiler.library``.
        compiler: Makes them.
    """

    def __init__(self, measurer: Measurer, compiler: Compiler):
        self._measurer, self._compiler = measurer, compiler
        self.device = measurer.device

    def __call__(self, problem: Problem, variants: Sequence[str]) -> list[Measurement]:
        begin = perf_counter()
        failed = self._compiler.build(problem, variants)
        seconds = (perf_counter() - begin) / max(len(variants), 1)
        compiled = [name for name in variants if name not in failed]
        measured = self._measurer(problem, compiled) if compiled else []
        found = dict(zip(compiled, measured, strict=True))
        found |= {name: rejected(reason, 0.0) for name, reason in failed.items()}
        return [replace(found[name], seconds=found[name].seconds + seconds) for name in variants]

    def confirm(self, problem: Problem, variant: str) -> Measurement:
        """As the protocol has it; what a study knows may have to be compiled first."""
        failed = self._compiler.build(problem, [variant])
        if failed:
            return rejected(failed[variant], 0.0)
        return self._measurer.confirm(problem, variant)
