"""The world: places of ranks, their groups, and a process that is alone."""

import contextlib

import pytest
import torch
from ranks import run_ranks

from fastshard import environment
from fastshard.dist import World, join_world, local_device


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_places_of_four_stages():
    ranks = run_ranks(4, "world_programs:describe", 1)
    for rank, place in enumerate(ranks):
        gathered = place.pop("gathered")
        assert gathered == [{"rank": i, "of": None} for i in range(4)]
        assert place == {
            "rank": rank,
            "size": 4,
            "stage": (rank, 4),
            "tp_index": 0,
            "ends": (rank == 0, rank == 3),
            "next": [1, 2, 3, 0][rank],
            "previous": [3, 0, 1, 2][rank],
            "tensor": None,
            "forward": [0, 1, 2, 3],
            "is_apart": True,
            "uses_nccl": False,
            "num_sharing": 4,  # the CPUs of one host
        }


def test_places_of_two_stages_of_two_ranks():
    ranks = run_ranks(4, "world_programs:describe", 2)
    assert [place["stage"] for place in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [place["tp_index"] for place in ranks] == [0, 1, 0, 1]
    assert [place["ends"] for place in ranks] == [(True, False)] * 2 + [(False, True)] * 2
    assert [place["next"] for place in ranks] == [2, 3, 0, 1]
    assert [place["previous"] for place in ranks] == [2, 3, 0, 1]
    tensor = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [place["tensor"] for place in ranks] == tensor
    assert ranks[3]["gathered"] == [{"rank": i, "of": tensor[i]} for i in range(4)]


def test_groups_do_not_wait_for_each_other():
    """What was sent last is received first, in its own group."""
    assert run_ranks(2, "world_programs:messages_in_each_group") == [[11.0, 1.0], [10.0, 0.0]]


def test_the_store_has_room_for_others():
    assert run_ranks(2, "world_programs:use_the_store") == [["from 0", "from 1"]] * 2


def test_a_world_is_left_unless_something_went_wrong():
    """Then the others may never leave it."""
    assert run_ranks(2, "world_programs:is_initialized", False) == [[True, False]] * 2
    assert run_ranks(2, "world_programs:is_initialized", True) == [[True, True]] * 2


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda:2"),
        ("cuda:0", 2, "cuda:0"),
        ("cuda", None, "cuda"),
        (torch.device("cuda"), 1, "cuda:1"),
    ],
)
def test_the_device_of_a_rank(monkeypatch, device, local_rank, expected):
    if local_rank is not None:
        for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", local_rank)):
            monkeypatch.setenv(name, str(value))
    assert local_device(device) == torch.device(expected)


def test_tp_must_divide_the_ranks():
    message = "tp must divide the world of 3 ranks, got 2"
    assert run_ranks(3, "world_programs:join_with_tp", 2) == [message] * 3


def test_a_process_that_is_alone():
    with join_world() as world:
        assert (world.rank, world.size, world.stage, world.num_stages) == (0, 1, 0, 1)
        assert world.is_first_stage
        assert world.is_last_stage
        assert world.groups is world.store is None
        assert world.gather("x") == ["x"]
        assert world.device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


def test_one_rank_of_torchrun_is_alone(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with join_world() as world:
        assert (world.size, world.groups) == (1, None)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", None])
def test_what_torchrun_says(monkeypatch, missing):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.delenv(missing)
    assert environment.launched_rank() == (None if missing else (5, 8, 1))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0, 1), {"tp": 2}, r"^tp must divide the world of 1 ranks, got 2$"),
        ((0, 4), {"tp": 0}, r"^tp must divide the world of 4 ranks, got 0$"),
        ((4, 4), {}, r"^rank must be 0 to 3, got 4$"),
        ((0, 4), {}, r"^a world of 4 ranks needs a store, got None$"),
    ],
)
def test_worlds_that_cannot_be(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        World(*arguments, **settings)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_dropped_at_the_end(fails):
    """Also after an error, the last first, once."""
    dropped = []
    with contextlib.suppress(ZeroDivisionError), World() as world:
        world.at_end(lambda: dropped.append("first"))
        world.at_end(lambda: dropped.append("second"))
        _ = 1 / (not fails)  # an error, where it is to fail
    assert dropped == ["second", "first"]
    world.close()
    assert dropped == ["second", "first"]
