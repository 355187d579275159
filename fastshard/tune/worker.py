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
from collections.abc import Iterator
from importlib import import_module

_DONE = {"done": True}


class WorkerFailed(Exception):
    """The process ended, or was killed since it did not answer."""


class Worker:
    """Starts the process at the first request, and again after it failed.

    Args:
        target: ``module:function`` of (request) -> iterator of messages.
        timeout: Seconds without a message after which the process is killed.
        environment: Of the process; by default this one's.
    """

    def __init__(self, target: str, *, timeout: float, environment: dict[str, str] | None = None):
        self._target, self._timeout, self._environment = target, timeout, environment
        self._process: subprocess.Popen | None = None

    def ask(self, request: dict) -> Iterator[dict]:
        """The messages of the answer.

        Raises:
            WorkerFailed: with the reason. The next request starts a new process.
        """
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._end()) from None
        while True:
            try:
                line = self._lines.get(timeout=self._timeout)
            except queue.Empty:
                self._process.kill()
                self._end()
                text = f"no answer for {self._timeout:g} s: killed"
                raise WorkerFailed(text) from None
            if line is None:
                raise WorkerFailed(self._end())
            message = json.loads(line)
            if message == _DONE:
                return
            yield message

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _start(self) -> None:
        here = (
            ["-P"] if sys.version_info >= (3, 11) else []
        )  # not a checkout, which -m would import
        self._process = subprocess.Popen(
            [sys.executable, *here, "-m", __name__, self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        for read in (self._read_lines, self._read_errors):
            threading.Thread(target=read, args=(self._process,), daemon=True).start()

    def _read_lines(self, process: subprocess.Popen) -> None:
        lines = self._lines
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def _read_errors(self, process: subprocess.Popen) -> None:
        errors = self._errors
        for line in process.stderr:
            errors[:] = [*errors[-20:], line]

    def _end(self) -> str:
        """Wait for the process, which is ending; returns why."""
        status = self._process.wait()
        self._process.stdin.close()
        self._process = None
        last = " ".join("".join(self._errors[-1:]).split())[:200]
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the process ended {how}" + (f": {last}" if last else "")


def _serve(target: str) -> None:
    module, function = target.split(":")
    answer = getattr(import_module(module), function)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no message
    for line in sys.stdin:
        for message in answer(json.loads(line)):
            print(json.dumps(message), file=channel, flush=True)
        print(json.dumps(_DONE), file=channel, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
