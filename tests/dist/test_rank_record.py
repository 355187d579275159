"""Processes looked up by id and start time, and records as they travel."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from fastshard.dist.rank_record import Process, RankRecord

HOST = re.escape(socket.gethostname())


@pytest.fixture
def child():
    """A process that waits until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_a_living_process(child):
    process = Process.of(child.pid)
    assert process != Process.of(os.getpid())
    assert process.is_here()
    assert process.can_act()
    assert not process.is_gone()
    assert str(process) == f"pid {child.pid} on {socket.gethostname()}"


def test_a_stopped_process_is_there_but_cannot_act(child):
    process = Process.of(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert not process.is_gone()
    assert not process.can_act()
    assert re.fullmatch(rf"pid {child.pid} on {HOST}, which is stopped", str(process))
    child.send_signal(signal.SIGCONT)
    os.waitpid(child.pid, os.WCONTINUED)
    assert process.can_act()


def test_a_killed_process_is_gone_before_and_after_it_is_reaped(child):
    process = Process.of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_gone()  # a zombie
    assert not process.can_act()
    child.wait()
    assert process.is_gone()
    assert not process.can_act()
    with pytest.raises(ValueError, match=f"^pid must be of a living process, got {child.pid}$"):
        Process.of(child.pid)


def test_another_process_with_the_same_id_is_not_it(child):
    process = Process.of(child.pid)
    earlier = replace(process, started=process.started - 1)
    assert earlier.is_gone()
    assert not earlier.can_act()


def test_of_another_machine_nothing_is_known(child):
    """Neither that it is gone nor that it lives, even where an id is the same or free here."""
    process = replace(Process.of(child.pid), machine="another", host="there")
    assert not process.is_here()
    assert not process.can_act()
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert str(process) == f"pid {child.pid} on there"
    child.kill()
    child.wait()
    assert not process.is_gone()
    assert not process.can_act()


def test_a_name_with_brackets_and_spaces_is_read_past(tmp_path):
    """The name of a program is the second field of its state, and may hold anything."""
    program = tmp_path / ") Z 1 (x"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process.of(child.pid)
        assert process.can_act()
        assert process.started > 0
        assert not process.is_gone()
        child.kill()


def test_a_record_arrives_as_it_was():
    record = RankRecord(
        3,
        Process.of(os.getpid()),
        launcher=7,
        layers="8-11",
        beat=5,
        step=2,
        doing="loading",
        by_commands=True,
        is_patient=True,
        issued=9,
        finished=8,
        awaits=True,
        idle=1.5,
        where="stage.py:7 in run",
        left=True,
    )
    assert RankRecord.from_json(record.to_json()) == record
