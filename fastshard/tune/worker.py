"""A process that answers requests, and what becomes of one that crashes or hangs.

The parent's side is ``Worker``. The child's, ``python -m fastshard.tune.worker MODULE:FUNCTION``,
reads requests and writes the messages of their answers, each a line of JSON.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module

START_TIMEOUT = 120.0
"""Seconds in which the process starts: it imports PyTorch."""
END_TIMEOUT = 10.0
"""Seconds in which it ends, after its last message or when killed."""

LONGEST_LINE = 2**20
"""Characters of a message; a longer one is none."""
MOST_LINES = 1000
"""Messages that wait to be read; the process waits with more."""

_READY, _DONE = {"ready": True}, {"done": True}


class WorkerFailed(Exception):
    """The process ended, or was killed since it did not answer."""


class WorkerHung(WorkerFailed):
    """It was killed since it did not answer."""


class Worker:
    """Starts the process at the first request, and again after it failed.

    Args:
        target: ``module:function`` of (request) -> iterator of messages.
        timeout: Seconds without a message after which the process, once started, is killed.
        environment: Of the process; by default this one's.
        start: Starts a command as ``subprocess.Popen`` does, with its keywords for pipes and text.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float,
        environment: dict[str, str] | None = None,
        start: Callable[..., subprocess.Popen] | None = None,
    ):
        self._target, self._timeout = target, timeout
        self._popen = start or partial(subprocess.Popen, env=environment)
        self._process: subprocess.Popen | None = None
        self._errors: list[str] = []

    @property
    def errors(self) -> str:
        """The last lines that it wrote to stderr, or a former process did."""
        return "".join(self._errors)

    def ask(self, request: dict, *, timeout: float | None = None) -> Iterator[dict]:
        """The messages of the answer.

        Args:
            request: JSON.
            timeout: In the place of the worker's.

        Raises:
            WorkerFailed: with the reason. The next request starts a new process.
        """
        if self._process is not None and self._process.poll() is not None:
            self._end()  # between two requests, which is the fault of neither
        is_answered = False
        try:
            if self._process is None:
                self._start()
            yield from self._answer(request, self._timeout if timeout is None else timeout)
            is_answered = True
        finally:
            if not is_answered:  # the rest would be taken for the answer to the next request
                self.close()

    def _answer(self, request: dict, timeout: float) -> Iterator[dict]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._end()) from None
        while (message := self._next(timeout)) != _DONE:
            yield message

    def _next(self, timeout: float) -> dict:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerHung(f"no answer for {timeout:g} s: killed") from None
        if line is None:
            raise WorkerFailed(self._end())
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):  # of a process that foreign code has taken over
            self.close()
            raise WorkerFailed(f"it answered what is no message: {line[:80]!r}")
        return message

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _start(self) -> None:
        # The package of this process, and not a checkout that it was started in.
        safely = ["-P"] if sys.version_info >= (3, 11) else []
        self._process = self._popen(
            [sys.executable, *safely, "-m", __name__, self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=MOST_LINES)
        self._errors = []
        self._readers = [
            threading.Thread(target=read, args=(self._process,), daemon=True)
            for read in (self._read_lines, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()
        self._next(START_TIMEOUT)  # _READY

    def _read_lines(self, process: subprocess.Popen) -> None:
        lines = self._lines
        while line := process.stdout.readline(LONGEST_LINE):
            lines.put(line)
        lines.put(None)

    def _read_errors(self, process: subprocess.Popen) -> None:
        errors = self._errors
        while line := process.stderr.readline(LONGEST_LINE):
            errors[:] = [*errors[-20:], line]

    def _end(self) -> str:
        """Wait for the process, which is ending; returns why."""
        status = self._status()
        for reader in self._readers:  # who else holds the pipes is not waited for
            reader.join(timeout=1)
        with suppress(BrokenPipeError):  # of a request that was not taken
            self._process.stdin.close()
        self._process = None
        last = " ".join("".join(self._errors[-1:]).split())[:200]
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the process ended {how}" + (f": {last}" if last else "")

    def _status(self) -> int:
        """Of the process, which is killed where it does not end by itself."""
        try:
            return self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _serve(target: str) -> None:
    module, function = target.split(":")
    answer = getattr(import_module(module), function)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no message
    print(json.dumps(_READY), file=channel, flush=True)
    for line in sys.stdin:
        for message in answer(json.loads(line)):
            print(json.dumps(message), file=channel, flush=True)
        print(json.dumps(_DONE), file=channel, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
