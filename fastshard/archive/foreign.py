"""Asking a process that runs foreign code: what goes wrong there is a reason to reject."""

import time
from collections.abc import Iterator
from pathlib import Path

from fastshard.archive import sandbox, trees, verdict
from fastshard.archive.processes import processor_seconds
from fastshard.archive.rules import Reason
from fastshard.tune.worker import Worker, WorkerFailed, WorkerHung

OPEN_SECONDS = 120.0
"""Without a message while a kernel is loaded, before which the device is set up."""
_DOING = {"load": "when it was loaded", "call": "when it was called", "time": "when it was timed"}


class Rejected(Exception):
    """A kernel is rejected: the reason."""

    def __init__(self, reason: Reason):
        super().__init__(reason.text)
        self.reason = reason


class Foreign:
    """A process in a sandbox; a context manager.

    Args:
        target: Of ``Worker``.
        box: Its sandbox.
        timeout: Seconds without a message after which it counts as hanging; of ``open``, at least
            ``OPEN_SECONDS``.
    """

    def __init__(self, target: str, box: sandbox.Sandbox, timeout: float):
        self.box = box
        self._timeout = timeout
        self._process: sandbox.Process | None = None
        self._worker = Worker(target, timeout=timeout, start=self._start)
        self._has_started = False

    def ask(self, **request) -> dict:
        """All messages of the answer as one.

        Raises:
            Rejected: what it raised, or how the process ended.
            RuntimeError: the sandbox could not be made, or nothing be loaded in it.
        """
        said: dict = {}
        for message in self._messages(request):
            said |= message
            if "failure" in message:
                if request["do"] == "open" and "begins" not in said:
                    raise RuntimeError(f"a kernel cannot be loaded here: {message['failure']}")
                raise Rejected(_failure(str(message["failure"])))
        return said

    def seconds(self, *, on_cpu: bool, **request) -> float:
        """Between the messages ``begins`` and ``ends`` of the answer, as seen from here.

        Args:
            on_cpu: Whether the processes' own time, as the kernel of the system counts it, is as
                good where it is less: on a machine that is busy with other things it is.
            request: As of ``ask``.

        Raises:
            Rejected: as of ``ask``, or one of them did not come.
        """
        clocks: dict[str, tuple[float, float]] = {}
        for message in self._messages(request):
            if "begins" in message or "ends" in message:
                used = processor_seconds(self._process.pid)
                clocks |= dict.fromkeys(message, (time.perf_counter(), used))
        if not {"begins", "ends"} <= clocks.keys():
            raise Rejected(Reason(verdict.CRASHED, "when it was timed: it sent no end"))
        wall, used = (e - b for b, e in zip(clocks["begins"], clocks["ends"], strict=True))
        return min(wall, used) if on_cpu else wall

    @property
    def errors(self) -> str:
        """The end of what it wrote to stderr."""
        return self._worker.errors

    def take(self, path: Path, folder: Path) -> trees.Packed:
        """What it wrote.

        Args:
            path: In its sandbox.
            folder: Of this process alone, where a copy is made and removed again.

        Raises:
            Rejected: it is no file of ``trees``.
        """
        copy = folder / "taken"
        try:
            sandbox.take_file(path, copy, self.box.limits.file_bytes)
            packed = trees.load(copy)
            # Strides of 0 would let a small file stand for more than fits into memory.
            if not all(x.is_contiguous() for x in trees.tensors_of(packed.value())):
                raise ValueError("a tensor of it is not contiguous")
            return packed
        except ValueError as error:
            raise Rejected(
                Reason(verdict.CRASHED, f"its answer was not written: {error}")
            ) from None
        finally:
            copy.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def __enter__(self) -> "Foreign":
        return self

    def __exit__(self, *exception) -> None:
        self._worker.close()

    def _start(self, command: list[str], **pipes) -> sandbox.Process:
        self._process = self.box.start(command, **pipes)
        return self._process

    def _messages(self, request: dict) -> Iterator[dict]:
        doing = ""
        is_opened = request["do"] == "open"
        timeout = max(OPEN_SECONDS, self._timeout) if is_opened else self._timeout
        try:
            for message in self._worker.ask(request, timeout=timeout):
                self._has_started = True
                doing = _DOING.get(str(message.get("begins")), doing)
                yield message
        except WorkerFailed as error:
            if not self._has_started:  # and nothing foreign has run that could be at fault
                raise RuntimeError(f"the sandbox does not start: {error}") from None
            raise Rejected(self._ended(error, doing)) from None

    def _ended(self, error: WorkerFailed, doing: str) -> Reason:
        when = f"{doing}: " if doing else ""
        if self._process is not None and self._process.overstepped:
            return Reason(verdict.TOO_MUCH_MEMORY, f"{when}{self._process.overstepped}")
        kind = verdict.HUNG if isinstance(error, WorkerHung) else verdict.CRASHED
        return Reason(kind, f"{when}{error}")


def _failure(text: str) -> Reason:
    """An error of CUDA leaves its process good for nothing: it is a crash."""
    is_fatal = text.startswith("AcceleratorError") or "CUDA error" in text
    return Reason(verdict.CRASHED if is_fatal else verdict.REFUSED, text)
