"""Hops: what is sent arrives in its order, in the memory given, and is counted at its source."""

import torch
from ranks import run_ranks

from fastshard.dist import MAX_TOKENS, Sent, World, connect
from helpers import CUDA_ONLY, NCCL_LIMIT, check_place


def test_tensors_wait_on_their_way_for_a_rank_that_is_busy():
    """A stage that waited with them would never come to receive what it must."""
    for rank, (got, forward, back, spilled) in enumerate(run_ranks(3, "world_programs:send_ahead")):
        source = (rank - 1) % 3
        assert got == [[10.0 * source + i] * 6 for i in range(3)]
        is_last = rank == 2
        assert (forward, back)[is_last] == Sent(3 * 6 * torch.float32.itemsize, 6)
        assert (back, forward)[is_last] == Sent(0, 0)  # what connected the ranks does not count
        assert not spilled


def test_one_stage_has_no_hops():
    assert connect(World()) is None
    assert run_ranks(2, "world_programs:hops_of_one_stage") == [True, True]


@CUDA_ONLY
def test_tokens_leave_two_gpus_unasked(device):
    """As many as may be on their way; else the last stage would wait for the first."""
    check_place("cuda")
    results = run_ranks(2, "world_programs:send_over_nccl", limit=NCCL_LIMIT)
    assert results == [(list(range(MAX_TOKENS)), True), ([], True)]
