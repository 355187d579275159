"""Ranks under a ``Watch``, in processes of their own: their exit codes, and what they wrote.

They are forked from a process that has imported torch: a launcher and its ranks take seconds to.
"""

import importlib
import json
import multiprocessing
import os
import sys
import time
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

    def __init__(
        self,
        path,
        size: int,
        function: str,
        *arguments: Any,
        port: int = 0,
        rank_0_keeps_store: bool = False,
    ):
        self.size = size
        self._path = path
        limit = timedelta(seconds=LIMIT)
        if not rank_0_keeps_store:
            self.store = dist.TCPStore(
                "127.0.0.1", port, is_master=not port, wait_for_workers=False, timeout=limit
            )
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port or self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": not rank_0_keeps_store,
            }
            outputs = [str(path / f"{name}{rank}") for name in ("stdout", "stderr")]
            process = _CONTEXT.Process(
                target=_run, args=(outputs, environment, function, arguments)
            )
            process.start()
            self.processes.append(process)
        if rank_0_keeps_store:
            self.store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)

    def __enter__(self) -> "WatchedRanks":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_for(self, *keys: str) -> None:
        """Until the ranks have set these."""
        self.store.wait(list(keys), timedelta(seconds=LIMIT))

    def wait_for_beats(self, num_beats: int = 2) -> None:
        """Until each rank has read what was in the store before this call."""
        beats = [self.record(rank)["beat"] for rank in range(self.size)]
        end = time.monotonic() + LIMIT
        for rank, beat in enumerate(beats):
            while self.record(rank)["beat"] < beat + num_beats:
                assert time.monotonic() < end, f"rank {rank} is silent for {LIMIT} s"

    def record(self, rank: int) -> dict[str, Any]:
        """What the rank says of itself."""
        return json.loads(self.store.get(f"fastshard watch 0/rank {rank}"))

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

    def printed(self) -> list[str]:
        """What each rank wrote to stdout."""
        return [(self._path / f"stdout{rank}").read_text() for rank in range(self.size)]

    def message(self) -> str:
        """The only thing that any rank wrote."""
        (message,) = [text for text in self.errors() if text]
        return message

    def message_among_others(self) -> str:
        """The only line of fastshard, beside what torch says of a lost store."""
        lines = "".join(self.errors()).splitlines()
        (message,) = [line for line in lines if "fastshard: " in line]
        return message


def _run(outputs: list[str], environment: dict[str, Any], function: str, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    getattr(importlib.import_module("watch_programs"), function)(*arguments)
