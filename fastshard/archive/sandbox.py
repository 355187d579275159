"""Running a command as a process that is distrusted, and what of that a machine allows.

What is always done: a session and process group of its own, which is ended as a whole with all
that it forked; limits of CPU time, file size and, for compilers, address space; a watch over the
resident memory and the number of its processes; an empty home; an environment of a few variables.
Where the kernel gives an unprivileged process namespaces, also:

- ``network``: it has none, not even loopback, and no abstract Unix socket reaches it.
- ``processes``: it sees, signals and traces no process but its own.
- ``files``: all is read-only but its scratch folders; the home, /tmp and /run of the user are empty
  (so are the sockets in them); of /dev only a few nodes are left, and the GPUs.

What it cannot do: it does not filter system calls, so a hole in the kernel or in the GPU's driver
is a way out. What it may read (the system, Python's packages) it can read. The GPU is shared: its
kernels can hang the device or fill its memory. It cannot bound the processor's cache and clocks.
"""

import json
import os
import signal
import site
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastshard.archive import jail
from fastshard.archive.processes import resident, tree_of

GIB = 2**30
MAX_PROCESSES = 512
"""Processes of one sandbox, above which it is killed."""
WATCH_SECONDS = 0.1
KILL_SECONDS = 10.0
"""In which a killed process is gone, but where it waits for a device."""
PASSED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CC",
    "CXX",
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "VIRTUAL_ENV",
)
"""Variables that the process gets as they are."""


@dataclass(frozen=True)
class Limits:
    """Of one sandbox.

    Attributes:
        resident_bytes: Of all its processes together; watched.
        address_space_bytes: Of each process; None where a CUDA context must live, which reserves
            more addresses than a machine has memory.
        cpu_seconds: Of each process.
        file_bytes: Of each file that it writes.
    """

    resident_bytes: int = 16 * GIB
    address_space_bytes: int | None = None
    cpu_seconds: int = 3600
    file_bytes: int = 16 * GIB

    def as_resources(self) -> dict[str, int]:
        """Name of a limit in ``resource`` -> value."""
        found = {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_FSIZE": self.file_bytes,
        }
        if self.address_space_bytes is not None:
            found["RLIMIT_AS"] = self.address_space_bytes
        return found


class Process(subprocess.Popen):
    """A command in a sandbox; ``kill`` ends all its processes.

    Attributes:
        overstepped: Which watched limit it was killed at, or None.
    """

    overstepped: str | None = None

    def watch(self, resident_bytes: int) -> None:
        """Kill it when its processes hold more memory than this, or are too many."""
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(resident_bytes,), daemon=True).start()

    def kill(self) -> None:
        if self.returncode is not None:  # its number may be another's by now
            return
        # The jail comes last: it adopts orphans, so what is forked meanwhile stays below it.
        deadline = time.monotonic() + KILL_SECONDS
        while len(pids := tree_of(self.pid)) > 1 and time.monotonic() < deadline:
            for pid in reversed(pids[1:]):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _watch(self, resident_bytes: int) -> None:
        while self.returncode is None:
            pids = tree_of(self.pid)
            held = sum(map(resident, pids))
            if held > resident_bytes:
                self.overstepped = f"more than {resident_bytes / GIB:.3g} GiB of resident memory"
            elif len(pids) > MAX_PROCESSES:
                self.overstepped = f"more than {MAX_PROCESSES} processes"
            if self.overstepped:
                self.kill()
                return
            self._over.wait(WATCH_SECONDS)


@dataclass(frozen=True)
class Sandbox:
    """How commands are run.

    Args:
        scratch: Folder of this sandbox: its home and temporary files; its only writable place.
        limits: See ``Limits``.
        parts: Kinds of isolation, of ``jail.PARTS``.
        readable: Files and folders that it needs beside Python's own.
    """

    scratch: Path
    limits: Limits = Limits()
    parts: Sequence[str] = jail.PARTS
    readable: Sequence[Path] = ()

    def start(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None, **pipes
    ) -> Process:
        """Start a command. It is killed when the thread ends that started it.

        Args:
            command: Program and arguments.
            variables: Of its environment, beside ``PASSED``.
            pipes: As ``subprocess.Popen`` takes them.
        """
        scratch = self.scratch.resolve()
        for name in ("home", "tmp"):
            (scratch / name).mkdir(parents=True, exist_ok=True)
        home = str(Path.home())
        plan = {
            "parts": list(self.parts),
            "limits": self.limits.as_resources(),
            "hidden": [path for path in ("/tmp", "/var/tmp", "/run", home) if path != "/"],
            "scratch": ["/tmp", "/var/tmp"],
            "visible": sorted({*python_paths(), *_both(self.readable)}),
            "writable": [str(scratch)],
        }
        program = [sys.executable, "-I", "-S", jail.__file__, json.dumps(plan), *command]
        process = Process(
            program,
            start_new_session=True,  # and with it no terminal whose keys it could type
            umask=0o077,
            cwd=scratch,
            env=self._environment(variables or {}),
            **pipes,
        )
        process.watch(self.limits.resident_bytes)
        return process

    def run(
        self, command: Sequence[str], *, timeout: float, variables: Mapping[str, str] | None = None
    ) -> "Finished":
        """Run a command to its end, or kill it after ``timeout`` seconds."""
        with tempfile.TemporaryFile() as said:  # a file, since who keeps a pipe open could block
            with self.start(
                command, variables, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            ) as process:
                is_late = False
                try:
                    process.wait(timeout)
                except subprocess.TimeoutExpired:
                    is_late = True
                    process.kill()
                    process.wait()
            length = said.seek(0, os.SEEK_END)
            said.seek(max(0, length - 100_000))
            text = said.read().decode(errors="replace")
        return Finished(process.returncode, text, is_late, process.overstepped)

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in PASSED if name in os.environ}
        if site.ENABLE_USER_SITE:
            kept["PYTHONUSERBASE"] = site.getuserbase()
        return {
            **kept,
            "HOME": str(self.scratch.resolve() / "home"),
            "TMPDIR": str(self.scratch.resolve() / "tmp"),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            # torch.compile's helpers, one a core, would count as memory of the sandbox.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **variables,
        }


@dataclass(frozen=True)
class Finished:
    """A command that ended: its status, the end of what it wrote, why it was killed."""

    status: int
    output: str
    is_late: bool
    overstepped: str | None


@cache
def missing_parts() -> dict[str, str]:
    """The kinds of isolation that this machine does not allow -> why."""
    found: dict[str, str] = {}
    for parts in ([*jail.PARTS], *([part] for part in jail.PARTS)):
        with tempfile.TemporaryDirectory() as folder:
            # What the command does shows that Python can still be run in it.
            probe = Sandbox(Path(folder), parts=parts)
            ended = probe.run([sys.executable, "-c", "import json"], timeout=60)
        if ended.status == 0 and len(parts) > 1:
            return {}
        if ended.status != 0 and len(parts) == 1:
            found[parts[0]] = " ".join(ended.output.split()) or f"status {ended.status}"
    return found


def allowed_parts() -> list[str]:
    """The kinds of isolation that this machine allows."""
    return [part for part in jail.PARTS if part not in missing_parts()]


@contextmanager
def temporary(limits: Limits, parts: Sequence[str], readable: Sequence[Path]) -> Iterator[Sandbox]:
    """A sandbox whose scratch folder is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastshard-") as folder:
        yield Sandbox(Path(folder).resolve(), limits, parts, readable)


def _both(paths: Sequence[Path]) -> set[str]:
    """Paths as they are named and where they lie: either may be what a process is given."""
    return {str(path.absolute()) for path in paths} | {str(path.resolve()) for path in paths}


def take_file(source: Path, target: Path, max_bytes: int) -> None:
    """Copy what a distrusted process wrote, which may still change it, to where it cannot.

    Raises:
        ValueError: it is no regular file, like a link to another or a pipe that would block, or is
            larger.
    """
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{source.name} must be a file: {error.strerror}") from None
    with open(handle, "rb") as file, target.open("wb") as copy:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            raise ValueError(
                f"{source.name} must be a file of at most {max_bytes} bytes, "
                f"got {found.st_size} bytes of mode {stat.filemode(found.st_mode)}"
            )
        left = found.st_size
        while left > 0 and (part := file.read(min(left, 2**24))):
            copy.write(part)
            left -= len(part)


def python_paths() -> set[str]:
    """Folders without which this Python and its packages do not run."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path}
    paths |= {str(Path(path).resolve()) for path in paths if path}
    paths |= {str(Path(jail.__file__).resolve().parents[2])}
    return {path for path in paths if path and os.path.isabs(path) and os.path.exists(path)}
