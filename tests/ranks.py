"""Functions run as the ranks of a world, in processes of their own."""

import importlib
import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

LIMIT = 300  # seconds; generous, for a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the process that the ranks are forked from; no thread runs in it.
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "fastshard"])


def _start_forkserver() -> None:
    """Start it in a folder without modules: it looks in its folder first, be that a checkout."""
    here = os.getcwd()
    os.chdir("/")
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def run_ranks(size: int, program: str, *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """Run a function on ``size`` ranks with the environment of torchrun.

    Args:
        program: ``module:function`` of a module that tests can import.
        arguments: Of the function; pickled.
        limit: Seconds in which one more rank has to return.

    Returns:
        What each rank returned.

    Raises:
        AssertionError: a rank raised, died or took too long; says which, with its traceback.
    """
    _start_forkserver()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe()
        environment = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        process = _CONTEXT.Process(target=_run, args=(theirs, environment, program, arguments))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return _results({pipe: rank for rank, (_, pipe) in enumerate(ranks)}, limit)
    finally:  # each has said its last word, or nobody wants it
        for process, _ in ranks:
            process.kill()
            process.join()


def package_file() -> str:
    """Which fastshard a rank imports."""
    import fastshard

    return fastshard.__file__


def _results(pipes: dict[Connection, int], limit: float) -> list[Any]:
    """What the ranks returned; the first that raises or dies ends the wait for all."""
    results = [None] * len(pipes)
    pending = dict(pipes)
    while pending:
        ready = wait(list(pending), limit)
        assert ready, f"ranks {sorted(pending.values())} said nothing for {limit} s"
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert error is None, f"rank {rank} raised\n{error}"
    return results


def _run(pipe, environment: dict[str, Any], program: str, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    module, function = program.split(":")
    try:
        result = getattr(importlib.import_module(module), function)(*arguments)
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        raise
    pipe.send((None, result))
