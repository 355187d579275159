"""What a rank tells of itself: phases, commands, idleness and the place where it stands."""

import os
import re
import threading

import pytest

from fastshard.dist.rank_record import Process, RankRecord
from fastshard.dist.steps import Steps
from fastshard.text import Detokenizer


class Event:
    """A command on a device: done when the test says so."""

    is_done = False

    def __init__(self):
        self.num_queries = 0

    def query(self):
        self.num_queries += 1
        return self.is_done


@pytest.fixture
def steps():
    return Steps(RankRecord(2, Process.of(os.getpid()), 1))


def snapshot(steps, now, slow_after=5.0):
    return steps.snapshot(now, slow_after=slow_after)


def test_phases_and_layers(steps):
    first = snapshot(steps, 0.0)
    assert (first.rank, first.layers, first.step, first.doing) == (2, "", 0, "starting")
    steps.hold(range(8, 12))
    steps.begin("loading", is_patient=True)
    second = snapshot(steps, 1.0)
    assert (second.layers, second.step, second.doing) == ("8-11", 1, "loading")
    assert (second.is_patient, second.by_commands) == (True, False)
    steps.begin("generating", by_commands=True)
    third = snapshot(steps, 2.0)
    assert (third.step, third.is_patient, third.by_commands) == (2, False, True)
    assert [first.beat, second.beat, third.beat] == [1, 2, 3]
    assert not third.left
    steps.leave()
    assert snapshot(steps, 3.0).left


@pytest.mark.parametrize(
    ("change", "is_news"),
    [
        (lambda steps: steps.hold(range(2)), True),
        (lambda steps: steps.begin("loading"), True),
        (Steps.leave, True),
        (Steps.advance, False),
        (Steps.issue, False),
        (Steps.finish, False),
    ],
)
def test_news_are_told_at_once_and_commands_now_and_then(steps, change, is_news):
    change(steps)
    assert steps.changed.is_set() is is_news


def test_commands_are_counted_over_phases(steps):
    steps.begin("generating", by_commands=True)
    for _ in range(3):
        steps.issue()
    for _ in range(2):
        steps.finish()
    steps.awaits = True
    steps.begin("closing")
    record = snapshot(steps, 0.0)
    assert (record.issued, record.finished, record.awaits) == (3, 2, True)


@pytest.mark.parametrize(
    "move",
    [
        Steps.advance,
        Steps.issue,
        Steps.finish,
        lambda steps: steps.begin("more"),
    ],
)
def test_every_move_ends_idleness(steps, move):
    snapshot(steps, 10.0)
    assert snapshot(steps, 13.0).idle == 3.0
    move(steps)
    assert snapshot(steps, 14.0).idle == 0.0
    assert snapshot(steps, 14.5).idle == 0.5


def test_a_command_is_finished_when_its_event_is_done(steps):
    events = [Event() for _ in range(3)]
    for event in events:
        steps.finish(event)
    events[1].is_done = True
    assert snapshot(steps, 0.0).finished == 0  # in order: the first one is not done
    events[0].is_done = True
    last = Event()
    steps.finish(last)
    assert snapshot(steps, 0.0).finished == 2
    assert last.num_queries == 0


def test_events_are_asked_by_the_watching_thread_only_when_it_is_slow(steps):
    """A query from another thread would break a capture of a graph."""
    event = Event()
    steps.finish(event)
    asked = event.num_queries
    snapshot(steps, 1.0)
    event.is_done = True
    assert snapshot(steps, 5.9).finished == 0
    assert event.num_queries == asked
    record = snapshot(steps, 6.0)
    assert (record.finished, record.idle) == (1, 0.0)


def test_the_place_is_looked_up_when_it_is_slow(steps):
    """Of the frames in fastshard the innermost: those further in say little."""
    started, go_on = threading.Event(), threading.Event()
    found = []

    def decode(tokens):
        started.set()
        go_on.wait()
        return ""

    def work():
        found.append(Steps(RankRecord(0, Process.of(os.getpid()), 1)))
        Detokenizer(decode).push(1)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    records = [snapshot(found[0], now) for now in (0.0, 4.9, 5.0)]
    go_on.set()
    thread.join()
    assert [bool(record.where) for record in records] == [False, False, True]
    assert re.fullmatch(r"text\.py:\d+ in _pending", records[2].where)
