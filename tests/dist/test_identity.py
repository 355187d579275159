"""What ranks must have in common: the exact error, and that unknown facts agree."""

import threading

import pytest
import torch.distributed as dist

from fastshard.dist import identity
from fastshard.dist.identity import check_same, describe_difference

SAME = {"fastshard version": "1.0", "num_layers in config.json": 4, "tensor a": "[2] float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {}, {}], None),
        (
            [{}, {"fastshard version": "1.1"}, {}],
            "all ranks must have the same fastshard version, got 1.0 on ranks 0,2, 1.1 on rank 1",
        ),
        (
            [{}, {}, {}, {"num_layers in config.json": 5}],
            "all ranks must have the same num_layers in config.json, got 4 on ranks 0-2, "
            "5 on rank 3",
        ),
        (
            [{"tensor b": "[3]"}, {"tensor a": "[7]"}],
            "all ranks must have the same tensor a, got [2] float32 on rank 0, [7] on rank 1; "
            "1 more differ: tensor b",
        ),
        (
            [{}, {f"tensor {name}": "x" for name in "bcdef"}],
            "all ranks must have the same tensor b, got none on rank 0, x on rank 1; "
            "4 more differ: tensor c, tensor d, tensor e, ...",
        ),
        # A rank without the file of a tensor does not know; it agrees with every other.
        ([{"tensor a": None}, {}, {"tensor a": None}], None),
        (
            [{"tensor a": None}, {}, {"tensor a": "[7]"}],
            "all ranks must have the same tensor a, got [2] float32 on rank 1, [7] on rank 2",
        ),
        # Equal text, other type: what JSON says decides.
        (
            [{}, {"num_layers in config.json": [4, None]}],
            "all ranks must have the same num_layers in config.json, got 4 on rank 0, "
            "[4, null] on rank 1",
        ),
    ],
)
def test_the_difference_names_ranks_and_values(changes, message):
    assert describe_difference([SAME | change for change in changes]) == message


def outcomes(facts):
    """What ``check_same`` does on each rank, all at once on one store."""
    store = dist.HashStore()
    found = [None] * len(facts)

    def run(rank):
        try:
            check_same(store, rank, len(facts), facts[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_rank_raises_the_same_error():
    errors = outcomes([SAME, SAME | {"fastshard version": "1.1"}, SAME])
    message = "all ranks must have the same fastshard version, got 1.0 on ranks 0,2, 1.1 on rank 1"
    assert [(type(error), str(error)) for error in errors] == [(identity.RunError, message)] * 3


def test_equal_facts_pass_by_their_hashes(monkeypatch):
    monkeypatch.setattr(identity, "describe_difference", None)
    assert outcomes([SAME] * 3) == [None] * 3


def test_what_is_unknown_passes():
    assert outcomes([SAME, SAME | {"tensor a": None}]) == [None] * 2
