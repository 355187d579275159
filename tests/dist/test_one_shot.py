"""OneShotSum: which sums it takes, and what it does with them; on two GPUs, the sums themselves."""

import pytest
import torch
from ranks import run_ranks

from fastshard.dist import TensorParallel, join_world
from fastshard.dist.one_shot import MAX_BYTES, OneShotSum, Place, one_shot_refusal
from helpers import CUDA_ONLY, NCCL_LIMIT, check_place

BFLOAT16, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture
def of_two_alike():
    """Of two ranks that always have the same summand; its buffer is full of NaN."""
    buffer = torch.full([MAX_BYTES], 255, dtype=torch.uint8)

    def reduce(part, out):
        assert part.data_ptr() == buffer.data_ptr()  # where the others look for it
        out.copy_(part * 2)

    return OneShotSum(buffer, reduce, lambda n: [torch.zeros(n, dtype=torch.int64)] * 2)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 16), None])
def test_sums_in_place(of_two_alike, shape, dtype):
    x = torch.randn(shape or MAX_BYTES // dtype.itemsize).to(dtype)
    expected = x * 2
    assert of_two_alike.takes(x)
    assert of_two_alike.add_up(x) is x
    assert torch.equal(x, expected)


ROOM = MAX_BYTES // BFLOAT16.itemsize


@pytest.mark.parametrize(
    ("x", "is_taken"),
    [
        (torch.empty(4096, dtype=torch.float16), False),
        (torch.empty(4096, dtype=torch.int64), False),
        (torch.empty(0, dtype=BFLOAT16), False),
        (torch.empty(7, dtype=BFLOAT16), False),  # 14 bytes
        (torch.empty(4, dtype=FLOAT), True),  # 16
        (torch.empty(ROOM, dtype=BFLOAT16), True),
        (torch.empty(ROOM + 8, dtype=BFLOAT16), False),
        (torch.empty(2, 32, dtype=BFLOAT16)[:, :8], False),
        (torch.empty(33, dtype=BFLOAT16)[1:], False),
        (torch.empty(40, dtype=BFLOAT16)[8:], True),
    ],
)
def test_what_it_takes(of_two_alike, x, is_taken):
    assert of_two_alike.takes(x) is is_taken


def test_steps_share_their_memory(of_two_alike):
    memory = of_two_alike.step_memory(24)
    assert [len(words) for words in memory] == [24, 24]
    assert of_two_alike.step_memory(24) is memory
    assert len(of_two_alike.step_memory(40)[0]) == 40


def test_the_group_sums_the_rest(of_two_alike, monkeypatch):
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: summed.append(x))
    ranks = TensorParallel(0, 2, one_shot=of_two_alike)
    small, large = torch.ones(1, 1, 16), torch.ones(1, 2 * ROOM)
    assert torch.equal(ranks.add_up(small), torch.full((1, 1, 16), 2.0))
    assert ranks.add_up(large) is large
    assert len(summed) == 1
    assert summed[0] is large


def test_refusals(monkeypatch):
    can = {(0, 1), (1, 0), (1, 2), (2, 1), (0, 2)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) in can)
    a, b, c = (Place("host0", index) for index in range(3))
    assert one_shot_refusal([a, b]) is None
    assert one_shot_refusal([a, b, c]) == "cuda:2 cannot access the memory of cuda:0"
    assert one_shot_refusal([a, Place("host1", 1)]) == "the ranks are on several hosts"


def test_ranks_that_talk_by_gloo_fall_back():
    text = "sums in one shot are not possible, falling back to the group's: the ranks talk by gloo"
    assert run_ranks(2, "one_shot_programs:fall_back", None) == [([text], False), ([], False)]


def test_where_one_rank_cannot_none_does():
    """Each has tried; the first that says why is heard."""
    text = "sums in one shot are not possible, falling back to the group's: no such op on rank 1"
    assert run_ranks(2, "one_shot_programs:fall_back", 1) == [([text], False), ([], False)]
    assert run_ranks(2, "one_shot_programs:fall_back", 2) == [([], True), ([], True)]


@pytest.mark.parametrize("name", ["sums", "FASTSHARD_SUMS"])
def test_ways_to_sum_that_are_none_raise(monkeypatch, name):
    monkeypatch.setenv("FASTSHARD_SUMS", "fast")
    with pytest.raises(ValueError, match=f"^{name} must be one of group, one_shot, got 'fast'$"):
        join_world(sums="fast" if name == "sums" else None)


@CUDA_ONLY
@pytest.mark.parametrize("way", ["group", "one_shot"])
def test_sums_of_two_gpus(device, way):
    """In and out of a graph, many in a row."""
    check_place("cuda")
    is_one_shot = run_ranks(2, "one_shot_programs:sum_on_gpus", way, limit=NCCL_LIMIT)
    assert is_one_shot == [way == "one_shot"] * 2
