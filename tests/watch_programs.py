"""What ranks under a ``Watch`` run: in tests/dist/test_watch.py, and the command line itself."""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import faulty_rank
import torch
import torch.distributed as dist

from fastshard import cli
from fastshard.dist import RunError, Watch, torchrun_store

PERIOD = 0.05


def rank_and_size():
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def watched(timeout):
    store = torchrun_store()
    return store, Watch(store, *rank_and_size(), timeout=timeout, period=PERIOD)


def hold(watch):
    """Each rank has two layers, and is in the phase of commands."""
    rank, _ = rank_and_size()
    watch.steps.hold(range(2 * rank, 2 * rank + 2))
    watch.steps.begin("generating", by_commands=True)


def wait_until_known(store, rank):
    """Until the others can read of this rank what it holds."""
    while not json.loads(store.get(f"fastshard watch 0/rank {rank}"))["layers"]:
        pass


def wait_forever():
    """Inside C: no signal's handler, and no exception of another thread, gets through."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def leave(late):
    """All end well; one waits for a word of the test."""
    rank, _ = rank_and_size()
    store, watch = watched(300)
    with watch:
        hold(watch)
        if rank == late:
            store.set(f"ready {rank}", "1")
            store.wait(["go"], timedelta(seconds=300))
    store.set(f"through {rank}", "1")


def fail(how, failing, timeout=300):
    """One rank ends as ``how`` says; the others wait inside C."""
    rank, _ = rank_and_size()
    store, watch = watched(timeout)
    with watch:
        hold(watch)
        wait_until_known(store, rank)
        store.set(f"ready {rank}", "1")
        if rank in failing:
            store.wait([f"ready {r}" for r in range(rank_and_size()[1])], timedelta(seconds=300))
            fail_as(how, watch)
        wait_forever()


class LostDevice:
    """An event that its device cannot tell of; first asked for where all is well."""

    is_lost = False

    def query(self):
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.is_lost = True
        return False


def fail_as(how, watch):
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
    if how == "mistake":
        raise KeyError("x")
    if how == "run":
        raise RunError("all ranks must have the same x")
    if how == "lost":
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    if how == "exit":
        sys.exit(7)
    if how == "pipe":
        raise BrokenPipeError
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "end":
        os._exit(0)
    if how == "device":
        watch.steps.finish(LostDevice())
    if how == "stuck":
        watch.steps.issue()
        wait_forever()


def start_late(late, timeout):
    """One rank never gets so far that it could be watched."""
    if rank_and_size()[0] == late:
        wait_forever()
    with watched(timeout)[1]:
        wait_forever()


def fail_after_a_neighbour():
    """Rank 1 loses a connection; a while later rank 0, at fault, says why."""
    rank, _ = rank_and_size()
    store, watch = watched(300)
    with watch:
        hold(watch)
        wait_until_known(store, rank)
        if rank == 1:
            store.set("lost", "1")
            fail_as("lost", watch)
        store.wait(["lost"], timedelta(seconds=300))
        first = beat_of(store, 1)
        while beat_of(store, 1) < first + 10:
            pass
        fail_as("memory", watch)


def beat_of(store, rank):
    return json.loads(store.get(f"fastshard watch 0/rank {rank}"))["beat"]


def pass_on(failing):
    """Tensors go round over gloo until a rank is killed; each waits inside of gloo."""
    rank, size = rank_and_size()
    store, watch = watched(300)
    with watch:
        hold(watch)
        wait_until_known(store, rank)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        x = torch.zeros(1)
        for i in range(1000):
            if rank == failing and i == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank or i:
                dist.recv(x, (rank - 1) % size)
            dist.send(x, (rank + 1) % size)


def busy_in_python():
    """Rank 0 is in Python and cleans up; rank 1 raises."""
    rank, _ = rank_and_size()
    store, watch = watched(300)
    with watch:
        if rank == 1:
            store.wait(["busy"], timedelta(seconds=300))
            raise ValueError("no such thing")
        try:
            store.set("busy", "1")
            while True:
                time.sleep(0.001)
        finally:
            store.set("tidy", "1")


def keep_store(port_file):
    """A launcher that only keeps the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Path(port_file).write_text(str(store.port))
    torchrun_store().set("kept", "1")
    wait_forever()


def launch(how):
    """A launcher of one rank, whom it outlives or not."""
    if os.fork() == 0:
        fail(how, [])
    wait_forever()


def command(arguments, fault=None):
    """The command line; the last rank has a fault."""
    rank, size = rank_and_size()
    if fault is not None and rank == size - 1:
        faulty_rank.plant(fault, arguments)
    sys.exit(cli.main(arguments))
