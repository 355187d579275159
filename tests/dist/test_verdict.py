"""Who is at fault: from records and times alone, without a process or a clock."""

import os
import re
from dataclasses import replace

import pytest

from fastshard.dist.rank_record import Process, RankRecord
from fastshard.dist.verdict import Pulses, Verdict, of_death, of_hang, of_silence

LIMIT = 10.0
THERE = Process("another machine", "there", 70, 1)


def record(rank, step=3, finished=4, **changes):
    settings = {
        "layers": f"{2 * rank}-{2 * rank + 1}",
        "doing": "generating",
        "by_commands": True,
    } | changes
    process = replace(THERE, pid=70 + rank)
    return RankRecord(rank, process, 1, step=step, finished=finished, **settings)


def heard(*records, size=None):
    """All records heard at 100 s, and again, with another beat, whenever they are."""
    pulses = Pulses(size or len(records))
    pulses.hear(records, 100.0)
    return pulses


def alive(pulses, now):
    pulses.hear([replace(r, beat=r.beat + 1) for r in pulses.records.values()], now)
    return pulses


def test_a_verdict_names_rank_layers_and_cause():
    assert str(Verdict("out of memory", 2, "8-11")) == "rank 2 (layers 8-11): out of memory"
    assert str(Verdict("no such file", 2)) == "rank 2: no such file"
    assert str(Verdict("ranks differ")) == "ranks differ"


def test_a_verdict_arrives_as_it_was():
    verdict = Verdict("interrupted", 2, "8-11", status=130, is_quiet=True)
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_a_death_names_the_process():
    pulses = heard(record(1))
    assert str(of_death(pulses.records[1])) == (
        "rank 1 (layers 2-3): its process (pid 71 on there) died without a word: killed, or it "
        "crashed"
    )


def test_only_who_has_not_left_is_dead():
    gone = replace(Process.of(os.getpid()), started=1)
    here = replace(record(0), process=gone)
    assert [r.rank for r in heard(here, record(1)).dead()] == [0]
    assert heard(replace(here, left=True), record(1)).dead() == []


@pytest.mark.parametrize("stuck", range(4))
def test_the_first_stage_with_an_unfinished_command_hangs(stuck):
    """Those before it have finished the command, those behind it wait for it."""
    ranks = [record(r, finished=5 if r < stuck else 4, idle=LIMIT) for r in range(4)]
    ranks[0] = replace(ranks[0], issued=5)
    pulses = heard(*ranks)
    assert str(of_hang(pulses, 100.4, LIMIT)) == (
        f"rank {stuck} (layers {2 * stuck}-{2 * stuck + 1}): no progress for 10 s while "
        "generating, 4 of 5 commands finished"
    )


def test_the_oldest_command_counts_with_several_in_flight():
    """Rank 1 is slow as well, but rank 2 is the one that holds the oldest command."""
    ranks = [record(r, finished=f, idle=LIMIT) for r, f in enumerate([9, 6, 4, 4])]
    pulses = heard(replace(ranks[0], issued=9), *ranks[1:])
    assert of_hang(pulses, 100.0, LIMIT).rank == 2


def test_a_hang_is_one_only_after_the_limit():
    pulses = heard(record(0, issued=5, finished=5), record(1, idle=LIMIT - 1))
    assert of_hang(pulses, 100.9, LIMIT) is None
    assert of_hang(pulses, 101.1, LIMIT).rank == 1


def test_the_place_of_a_hang_is_named():
    pulses = heard(record(0, issued=5, idle=LIMIT, where="stage.py:7 in run"))
    assert str(of_hang(pulses, 100.0, LIMIT)).endswith(
        "4 of 5 commands finished, at stage.py:7 in run"
    )


def test_whoever_moves_hangs_not():
    """Rank 1 stands still only because rank 0 is slow, and rank 0 goes on."""
    pulses = heard(record(0, issued=5, idle=1.0), record(1, idle=3 * LIMIT))
    assert of_hang(pulses, 100.0, LIMIT) is None


def test_no_commands_no_hang():
    """The first rank waits for its user, or for the reader of its text, as long as it likes."""
    pulses = heard(record(0, issued=4, idle=1e6), record(1, idle=1e6))
    assert of_hang(alive(pulses, 1e6), 1e6, LIMIT) is None


def test_where_the_result_does_not_come_the_last_rank_hangs():
    pulses = heard(record(0, issued=4, awaits=True, idle=LIMIT), *[record(1), record(2)])
    assert of_hang(pulses, 105.0, LIMIT) is None
    pulses = heard(record(0, issued=4, awaits=True), record(1), record(2, idle=LIMIT))
    assert of_hang(pulses, 100.0, LIMIT).rank == 2


def test_the_one_that_still_loads_hangs():
    """The others wait for it in a later phase."""
    late = record(2, step=2, finished=0, doing="loading", by_commands=False, idle=LIMIT)
    pulses = heard(record(0, finished=0, idle=LIMIT), record(1, finished=0, idle=LIMIT), late)
    assert str(of_hang(pulses, 100.0, LIMIT)) == (
        "rank 2 (layers 4-5): no progress for 10 s while loading"
    )


def test_a_patient_phase_takes_any_time():
    late = record(1, step=1, finished=0, by_commands=False, is_patient=True, idle=1e6)
    waiting = record(0, step=2, finished=0, by_commands=False, idle=1e6)
    assert of_hang(alive(heard(waiting, late), 1e6), 1e6, LIMIT) is None


def test_one_that_is_not_heard_is_at_fault_though_another_stands_still():
    """Its last record is fresher than the rest, for it says nothing since."""
    pulses = heard(record(0, issued=5, idle=LIMIT), record(1, issued=5, idle=0.1))
    pulses.hear([replace(record(0, issued=5, idle=LIMIT), beat=1)], 106.0)
    verdict = of_hang(pulses, 106.0, LIMIT)
    assert str(verdict) == (
        "rank 1 (layers 2-3): no sign of life for 6 s while generating (pid 71 on there)"
    )


def test_silence_alone_is_a_hang_after_the_limit():
    """Even where there is nothing to do."""
    pulses = heard(record(0, issued=4), record(1))
    pulses.hear([replace(record(0, issued=4), beat=1)], 109.0)
    assert of_hang(pulses, 109.0, LIMIT) is None
    assert of_hang(pulses, 110.0, LIMIT).rank == 1


def test_a_record_read_again_is_no_sign_of_life():
    pulses = heard(record(0))
    pulses.hear([record(0)], 105.0)
    assert pulses.silence(0, 105.0) == 5.0
    pulses.hear([record(0, beat=1)], 106.0)
    assert pulses.silence(0, 106.0) == 0.0


def test_the_longest_silence_counts():
    pulses = heard(record(0), record(1), record(2, left=True))
    pulses.hear([record(0, beat=1)], 103.0)
    assert of_silence(pulses, 104.0, 4.5) is None
    assert of_silence(pulses, 104.0, 4.0).rank == 1


def test_a_rank_that_never_came():
    pulses = heard(record(0), record(2), size=4)
    alive(pulses, LIMIT - 0.1)
    assert of_hang(pulses, LIMIT - 0.1, LIMIT) is None
    assert re.fullmatch("rank 1: did not start within 10 s", str(of_hang(pulses, LIMIT, LIMIT)))


def test_who_has_left_is_not_missed():
    pulses = heard(record(0, issued=5, finished=5, left=True), record(1, left=True))
    assert pulses.all_left()
    assert of_hang(pulses, 1e6, LIMIT) is None
    assert not heard(record(0, left=True), record(1)).all_left()
    assert not heard(record(0, left=True), size=2).all_left()
