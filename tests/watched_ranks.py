"""Ranks that a ``Watch`` ends, in processes of their own: their exit codes, and what they wrote."""

import importlib
import multiprocessing
import os
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LIMIT = 120  # seconds; generous, for a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "fastshard"])


class WatchedRanks:
    """Ranks that run a function of ``watch_programs``, over a store of the test's own.

    Attributes:
        store: Their store: keys of the tests beside those of the watch.
        processes: One a rank.
    """

    def __init__(self, path, size: int, function: str, *arguments: Any, port: int = 0):
        self.size = size
        self._path = path
        self.store = None
        if not port:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port or self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": not port,
            }
            error_path = str(path / f"stderr{rank}")
            process = _CONTEXT.Process(
                target=_run, args=(error_path, environment, function, arguments)
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "WatchedRanks":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_for(self, *keys: str) -> None:
        """Until the ranks have set these."""
        self.store.wait(list(keys), timedelta(seconds=LIMIT))

    def exit_codes(self, num_ranks: int | None = None) -> list[int]:
        """Of all ranks, or the first ones, when they have ended."""
        processes = self.processes[:num_ranks]
        for process in processes:
            process.join(LIMIT)
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"ranks run on after {LIMIT} s: {codes}"
        return codes

    def errors(self) -> list[str]:
        """What each rank wrote to stderr."""
        return [(self._path / f"stderr{rank}").read_text() for rank in range(self.size)]

    def message(self) -> str:
        """The only thing that any rank wrote."""
        (message,) = [text for text in self.errors() if text]
        return message


def _run(error_path: str, environment: dict[str, Any], function: str, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    error_file = os.open(error_path, os.O_WRONLY | os.O_CREAT)
    os.dup2(error_file, sys.stderr.fileno())
    getattr(importlib.import_module("watch_programs"), function)(*arguments)
