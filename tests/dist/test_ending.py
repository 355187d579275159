"""How ranks end together: who speaks, who is waited for, who is killed. Stores are local."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastshard.dist import ending
from fastshard.dist.ending import end_together, is_first_here, kill, tell_launcher
from fastshard.dist.rank_record import Process, RankRecord
from fastshard.dist.verdict import Verdict

VERDICT = Verdict("out of memory", 2, "8-11")
SAID = "fastshard: error: rank 2 (layers 8-11): out of memory\n"


@pytest.fixture
def children():
    """Three ranks of one launcher, each a process that waits until it is killed."""
    command = [sys.executable, "-c", "input()"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    yield running
    for child in running:
        child.kill()
        child.wait()
        child.stdin.close()


@pytest.fixture
def ranks(children):
    return [RankRecord(i, Process.of(child.pid), 1) for i, child in enumerate(children)]


@pytest.fixture
def waits(monkeypatch):
    """How long each wait may take; none takes any time."""
    waits = []

    def wait(is_done, seconds):
        waits.append((seconds, bool(is_done())))

    monkeypatch.setattr(ending, "_wait", wait)
    return waits


def stop(child):
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)


def lives(child):
    """Whether the process was not killed; stops it. A kill that is on its way comes first."""
    child.send_signal(signal.SIGSTOP)
    return os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])


def hear(store, *numbers):
    for number in numbers:
        store.set(f"heard {number}", "1")


def test_one_rank_a_launcher_speaks(ranks, waits, capfd):
    store = dist.HashStore()
    hear(store, 0, 1, 2)
    other_host = replace(ranks[2], launcher=2)
    for me in (ranks[0], ranks[1], other_host):
        end_together(store, me, [*ranks[:2], other_host], VERDICT)
    assert capfd.readouterr().err == 2 * SAID
    # Only rank 1 had to wait for another to speak; it saw that it had.
    assert waits == [(2.0, True), (1.0, True), (2.0, True), (2.0, True)]


def test_where_the_first_does_not_speak_the_next_does(ranks, waits, capfd):
    store = dist.HashStore()
    hear(store, 0, 1, 2)
    end_together(store, ranks[1], ranks, VERDICT)
    assert capfd.readouterr().err == SAID
    assert waits[0] == (1.0, False)


def test_a_stopped_or_dead_rank_is_no_speaker(ranks, children):
    assert [is_first_here(rank, ranks) for rank in ranks] == [True, False, False]
    stop(children[0])
    assert [is_first_here(rank, ranks) for rank in ranks[1:]] == [True, False]
    children[1].kill()
    children[1].wait()
    assert is_first_here(ranks[2], ranks)
    others = [replace(rank, launcher=2) for rank in ranks[:2]]
    assert is_first_here(ranks[2], [*others, ranks[2]])


def test_a_quiet_end_says_nothing(ranks, waits, capfd):
    end_together(dist.HashStore(), ranks[0], ranks, replace(VERDICT, is_quiet=True))
    assert capfd.readouterr().err == ""


def test_who_does_not_hear_is_killed(ranks, children, waits):
    """Stopped: a launcher would wait for it for half a minute."""
    store = dist.HashStore()
    stop(children[1])
    hear(store, 2)
    end_together(store, ranks[0], ranks, VERDICT)
    assert waits == [(2.0, False)]
    assert children[1].wait(60) == -signal.SIGKILL
    assert lives(children[2])


def test_who_is_dead_or_elsewhere_is_not_killed_nor_the_dead_waited_for(ranks, children, waits):
    store = dist.HashStore()
    children[1].kill()
    children[1].wait()
    hear(store, 2)
    end_together(store, ranks[0], ranks, VERDICT)
    assert waits == [(2.0, True)]
    kill(ranks[1])
    there = replace(ranks[2], process=replace(ranks[2].process, machine="another"))
    kill(there)
    end_together(dist.HashStore(), ranks[0], [ranks[0], there], VERDICT)
    assert lives(children[2])


def test_a_rank_at_fault_elsewhere_is_not_waited_for(ranks, waits):
    """It may be dead. One on this machine may be stuck, and be killed; any other has to hear."""
    store = dist.HashStore()
    hear(store, 1)
    there = replace(ranks[2], process=replace(ranks[2].process, machine="another"))
    end_together(store, ranks[0], [*ranks[:2], there], VERDICT)
    end_together(store, ranks[0], [*ranks[:2], there], replace(VERDICT, rank=1))
    assert waits == [(2.0, True), (2.0, False)]
    end_together(store, ranks[0], ranks, VERDICT)
    assert waits[2] == (2.0, False)


def test_all_wait_until_the_last_has_heard(ranks, monkeypatch):
    """With real waits: nobody leaves before all three are here."""
    monkeypatch.setattr(ending, "_HEAR_SECONDS", 60.0)
    store = dist.HashStore()
    left = []

    def run(rank):
        end_together(store, ranks[rank], ranks, replace(VERDICT, is_quiet=True))
        left.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    store.wait(["heard 0", "heard 1"], timedelta(seconds=30))
    assert left == []
    run(2)
    for thread in threads:
        thread.join()
    assert sorted(left) == [0, 1, 2]


class GoneStore(dist.Store):
    def set(self, key, value):
        raise dist.DistNetworkError("Broken pipe")


def test_without_a_store_the_first_speaks_and_ends_the_rest(ranks, children, waits, capfd):
    end_together(GoneStore(), ranks[1], ranks, VERDICT)
    assert capfd.readouterr().err == ""
    assert [child.poll() for child in children] == [None] * 3
    end_together(GoneStore(), ranks[0], ranks, VERDICT)
    assert capfd.readouterr().err == SAID
    assert waits == [(2.0, False)]
    assert [children[1].wait(60), children[2].wait(60)] == [-signal.SIGKILL] * 2
    assert lives(children[0])
    end_together(GoneStore(), ranks[0], ranks, replace(VERDICT, is_quiet=True))
    assert capfd.readouterr().err == ""


def test_what_was_said_is_not_said_again_when_the_store_goes(ranks, waits, capfd, monkeypatch):
    store = dist.HashStore()
    hear(store, 1, 2)

    def check(store, ranks):
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(ending, "_deaf", check)
    monkeypatch.setattr(ending, "_wait", lambda is_done, seconds: is_done())
    end_together(store, ranks[0], ranks, VERDICT)
    assert capfd.readouterr().err == SAID


def test_the_launcher_is_told(tmp_path, monkeypatch):
    """In the format of torch.distributed.elastic's error files."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_launcher(VERDICT)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.message == "rank 2 (layers 8-11): out of memory"
    assert failure.timestamp == json.loads(path.read_text())["timestamp"] > 1.7e9
    path.unlink()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # as with --log-dir /dev/null
    tell_launcher(VERDICT)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    tell_launcher(VERDICT)
    assert list(tmp_path.iterdir()) == []
