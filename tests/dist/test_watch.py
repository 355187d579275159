"""Watch over real processes: who is named, how all end, and that they wait for each other."""

import os
import re
import select
import signal
import socket

import pytest
from watched_ranks import LIMIT, WatchedRanks


@pytest.fixture
def run(tmp_path):
    """Start ranks; whatever is left of them ends with the test."""
    started = []

    def run(*arguments, **settings):
        path = tmp_path / str(len(started))
        path.mkdir()
        started.append(WatchedRanks(path, *arguments, **settings))
        return started[-1]

    yield run
    for ranks in started:
        ranks.__exit__()


def test_all_leave_together_and_silently(run):
    """Nobody is through before the last is."""
    ranks = run(3, "leave", 1)
    through = [f"through {rank}" for rank in range(3)]
    ranks.wait_for("ready 1")
    ranks.wait_for_beats()  # though the main thread of rank 1 waits on the store
    for rank in (0, 2):
        while not (record := ranks.record(rank))["left"]:
            pass
        goes_on = record["beat"] + 3
        while ranks.record(rank)["beat"] < goes_on and not ranks.store.check([through[rank]]):
            pass
    assert not any(ranks.store.check([key]) for key in through)
    ranks.store.set("go", "1")
    assert ranks.exit_codes() == [0, 0, 0]
    assert ranks.errors() == [""] * 3
    ranks.wait_for(*through)


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("memory", 1, "rank 1 (layers 2-3): CUDA out of memory. Tried to allocate 2 GiB."),
        ("run", 1, "all ranks must have the same x"),
        (
            "lost",
            1,
            "rank 1 (layers 2-3): lost its connection to another rank, "
            "[/x/gloo/transport/tcp/pair.cc:1] Connection closed by peer",
        ),
        ("exit", 7, None),
        ("pipe", 1, None),
    ],
)
def test_a_rank_that_raises_ends_all(run, how, status, message):
    ranks = run(3, "fail", how, [1])
    assert ranks.exit_codes() == [status] * 3
    assert "".join(ranks.errors()) == (f"fastshard: error: {message}\n" if message else "")


def test_a_mistake_shows_its_traceback(run):
    ranks = run(2, "fail", "mistake", [1])
    assert ranks.exit_codes() == [1, 1]
    first, second = ranks.errors()
    assert first == "fastshard: error: rank 1 (layers 2-3): KeyError: 'x'\n"
    assert second.startswith("Traceback (most recent call last):\n")
    assert second.endswith("KeyError: 'x'\n")


@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("end", 0)])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_is_named(run, how, code, rank):
    """Also where it ends with status 0, as a library may do that calls exit."""
    ranks = run(3, "fail", how, [rank])
    pid = ranks.processes[rank].pid
    codes = ranks.exit_codes()
    assert codes.pop(rank) == code
    assert codes == [1, 1]
    assert re.fullmatch(
        rf"fastshard: error: rank {rank} \(layers {2 * rank}-{2 * rank + 1}\): its process "
        rf"\(pid {pid} on \S+\) died without a word: killed, or it crashed\n",
        ranks.message(),
    )


@pytest.mark.parametrize("rank", range(3))
def test_the_dead_is_to_blame_and_not_its_neighbours(run, rank):
    """Gloo's errors in those that were connected to it are no cause."""
    ranks = run(3, "pass_on", rank)
    codes = ranks.exit_codes()
    assert codes.pop(rank) == -signal.SIGKILL
    assert codes == [1, 1]
    line = ranks.message_among_others()
    assert line.startswith(f"fastshard: error: rank {rank} (layers {2 * rank}-{2 * rank + 1}): its")
    assert line.endswith(" died without a word: killed, or it crashed")


def test_a_lost_connection_waits_for_a_better_cause(run):
    ranks = run(2, "fail_after_a_neighbour")
    assert ranks.exit_codes() == [1, 1]
    message = "rank 0 (layers 0-1): CUDA out of memory. Tried to allocate 2 GiB."
    assert ranks.message() == f"fastshard: error: {message}\n"


def test_several_failures_give_one_message(run):
    ranks = run(3, "fail", "memory", [0, 1, 2])
    assert ranks.exit_codes() == [1, 1, 1]
    assert re.fullmatch(
        r"fastshard: error: rank [012] \(layers \d-\d\): CUDA out of memory\. .*\n", ranks.message()
    )


def test_a_rank_that_is_stuck_is_named(run):
    """Rank 0 gave a command and hangs in it; the others have nothing to do yet."""
    ranks = run(3, "fail", "stuck", [0], 10)
    assert ranks.exit_codes() == [1, 1, 1]
    assert re.fullmatch(
        r"fastshard: error: rank 0 \(layers 0-1\): no progress for 5 s while generating, "
        r"0 of 1 commands finished, at watch_programs\.py:\d+ in wait_forever\n",
        ranks.message(),
    )


def test_a_device_that_fails_meanwhile_is_a_cause(run):
    """Its rank waits, so that only the watch asks it."""
    ranks = run(2, "fail", "device", [1], 10)
    assert ranks.exit_codes() == [1, 1]
    assert ranks.message() == (
        "fastshard: error: rank 1 (layers 2-3): CUDA error: an illegal memory access was "
        "encountered\n"
    )


def test_a_stopped_rank_is_named_and_killed(run):
    ranks = run(3, "fail", "stop", [], 10)
    ranks.wait_for("ready 0", "ready 1", "ready 2")
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    assert ranks.exit_codes() == [-signal.SIGKILL, 1, 1]
    assert re.fullmatch(
        r"fastshard: error: rank 0 \(layers 0-1\): no sign of life for 5 s while generating "
        r"\(pid \d+ on \S+, which is stopped\)\n",
        ranks.message(),
    )


def test_a_rank_that_does_not_come_is_named(run):
    ranks = run(3, "start_late", 2, 10)
    assert ranks.exit_codes(2) == [1, 1]
    assert ranks.message() == "fastshard: error: rank 2: did not start within 5 s\n"


def test_an_interrupt_of_one_ends_all_quietly(run):
    """Even where every main thread is inside C."""
    ranks = run(3, "fail", "interrupt", [])
    ranks.wait_for("ready 0", "ready 1", "ready 2")
    os.kill(ranks.processes[1].pid, signal.SIGINT)
    assert ranks.exit_codes() == [130, 130, 130]
    assert ranks.errors() == [""] * 3


def test_an_end_from_outside_is_said(run):
    ranks = run(2, "fail", "terminate", [])
    ranks.wait_for("ready 0", "ready 1")
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.exit_codes() == [143, 143]
    assert ranks.message() == (
        "fastshard: error: rank 1 (layers 2-3): ended from outside, by SIGTERM\n"
    )


def test_a_rank_in_python_tidies_up_before_it_ends(run):
    """So that a terminal gets its cursor back."""
    ranks = run(2, "busy_in_python")
    assert ranks.exit_codes() == [1, 1]
    assert ranks.store.check(["tidy"])
    assert ranks.message() == "fastshard: error: rank 1: no such thing\n"


@pytest.fixture
def keeper(run, tmp_path):
    """A process that keeps the store of other ranks, and its port."""
    path = tmp_path / "port"
    keeper = run(1, "keep_store", str(path))
    keeper.wait_for("kept")
    return keeper.processes[0], int(path.read_text())


def test_without_their_store_the_ranks_end(run, keeper):
    process, port = keeper
    ranks = run(2, "fail", "nothing", [], port=port)
    ranks.wait_for("ready 0", "ready 1")
    ranks.wait_for_beats()
    process.kill()
    assert ranks.exit_codes() == [1, 1]
    message = ranks.message_among_others()
    assert message.startswith(
        "fastshard: error: rank 0 (layers 0-1): the store of the run has gone"
    )


def test_ranks_whose_store_hangs_end(run, keeper):
    process, port = keeper
    ranks = run(2, "fail", "nothing", [], 10, port=port)
    ranks.wait_for("ready 0", "ready 1")
    ranks.wait_for_beats()
    os.kill(process.pid, signal.SIGSTOP)
    assert ranks.exit_codes() == [1, 1]
    assert ranks.message() == (
        "fastshard: error: rank 0 (layers 0-1): the store of the run has not answered for 5 s\n"
    )


def test_ranks_whose_store_hangs_can_be_interrupted(run, keeper):
    process, port = keeper
    ranks = run(2, "fail", "nothing", [], port=port)
    ranks.wait_for("ready 0", "ready 1")
    ranks.wait_for_beats()
    os.kill(process.pid, signal.SIGSTOP)
    for rank in ranks.processes:
        os.kill(rank.pid, signal.SIGINT)
    assert ranks.exit_codes() == [130, 130]
    assert ranks.errors() == [""] * 2


def test_a_rank_that_takes_the_store_with_it_is_named(run):
    """As where no launcher keeps it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = run(3, "fail", "nothing", [], port=port, rank_0_keeps_store=True)
    ranks.wait_for("ready 0", "ready 1", "ready 2")
    ranks.wait_for_beats()
    ranks.processes[0].kill()
    assert ranks.exit_codes() == [-signal.SIGKILL, 1, 1]
    assert re.fullmatch(
        r"fastshard: error: rank 0 \(layers 0-1\): its process \(pid \d+ on \S+\) died without a "
        "word: killed, or it crashed",
        ranks.message_among_others(),
    )


def test_a_rank_outlives_no_launcher(run):
    launcher = run(1, "launch", "nothing")
    launcher.wait_for("ready 0")
    record = launcher.record(0)
    end = os.pidfd_open(record["process"]["pid"])
    launcher.processes[0].kill()
    assert select.select([end], [], [], LIMIT)[0]
    os.close(end)
    cause = f"its launcher (pid {record['launcher']}) has ended"
    assert launcher.message() == f"fastshard: error: rank 0 (layers 0-1): {cause}\n"
