"""Watch in one process: what it judges of what it was told, and what it asks of NCCL."""

import os
from dataclasses import replace

import pytest
import torch.distributed as dist

from fastshard.dist import watch
from fastshard.dist.rank_record import Process, RankRecord
from fastshard.dist.verdict import Verdict


@pytest.mark.parametrize(
    ("left", "verdict", "found"),
    [
        (True, None, None),
        (False, Verdict("out of memory", 1, "2-3"), "rank 1 (layers 2-3): out of memory"),
        (False, None, "rank 1 (layers 2-3): its process "),
    ],
)
def test_the_last_word_of_a_dead_rank_counts(left, verdict, found):
    """Also where it came after the records were read."""
    store = dist.HashStore()
    own = watch.Watch(store, 0, 2, timeout=300)
    gone = replace(Process.of(os.getpid()), started=1)
    record = RankRecord(1, gone, 1, layers="2-3", beat=1)
    own._listen(0.0)
    own._pulses.hear([record], 0.0)
    keys = dist.PrefixStore("fastshard watch 0", store)
    keys.set("rank 1", replace(record, beat=2, left=left).to_json())
    if verdict is not None:
        keys.set("verdict", verdict.to_json())
    assert str(own._find_verdict(0.0)).startswith(str(found))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CUDA error: misaligned", "rank 0: CUDA error: misaligned"),
        ("NCCL is upset", "rank 0: lost its connection to another rank, NCCL is upset"),
    ],
)
def test_what_may_follow_from_a_death_waits_for_it(text, found):
    """A GPU that reads memory of a process which has died reports an error of its own."""
    store = dist.HashStore()
    own = watch.Watch(store, 0, 2, timeout=300)
    other = RankRecord(1, Process.of(os.getpid()), 1, layers="2-3")
    keys = dist.PrefixStore("fastshard watch 0", store)
    own._error = RuntimeError(text)
    for now, expected in ((0.0, None), (2.9, None), (3.1, found)):
        other = replace(other, beat=other.beat + 1)
        keys.set("rank 1", other.to_json())
        own._listen(now)
        assert str(own._find_verdict(now)) == str(expected)
    gone = replace(Process.of(os.getpid()), started=1)
    keys.set("rank 1", replace(other, process=gone, beat=9).to_json())
    own._listen(3.2)
    assert str(own._find_verdict(3.2)).startswith("rank 1 (layers 2-3): its process ")


def test_layers_are_known_as_soon_as_the_rank_knows_them():
    own = watch.Watch(dist.HashStore(), 0, 1, timeout=300)
    own._listen(0.0)
    own.steps.hold(range(2, 5))
    own._error = MemoryError("no room")
    assert str(own._find_verdict(0.0)) == "rank 0 (layers 2-4): no room"


def test_time_for_which_a_process_is_stopped_does_not_count(monkeypatch):
    """Else all ranks of a machine that was asleep would blame each other when it wakes."""
    now = 50.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    clock = watch._LivedTime()
    now = 51.5
    assert clock.now() == 1.5
    now = 1000.0
    assert clock.now() == 3.5
    now = 1000.5
    assert clock.now() == 4.0


@pytest.mark.parametrize(("value", "expected"), [(None, "0"), ("1", "1")])
@pytest.mark.parametrize(
    "name", ["TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_RETHROW_CUDA_ERRORS"]
)
def test_nccl_leaves_failures_to_the_watch(monkeypatch, name, value, expected):
    """Unless the user wants it otherwise."""
    monkeypatch.setenv(name, value or "")
    if value is None:
        monkeypatch.delenv(name)
    with watch.Watch(dist.HashStore(), 0, 1, timeout=300, period=0.01):
        inside = os.environ.get(name)
    assert inside == expected
