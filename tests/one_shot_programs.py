"""What the ranks of tests/dist/test_one_shot.py run."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from fastshard.decode import capture
from fastshard.dist import TensorParallel, World, join_world, world
from fastshard.dist.one_shot import OneShotSum

NUM_SUMS = 60
SHAPES = ((1, 1, 8), (1, 1, 4096), (3, 5, 1000), (1, 40, 4096))  # the last is too large
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fall_back(failing: int | None) -> tuple[list[str], bool]:
    """Warnings, and whether it adds up in one shot, where that fails on one rank.

    Args:
        failing: The rank; None: the ranks are what they are, CPUs.
    """

    def meet(group, device):
        if dist.get_rank(group) == failing:
            raise RuntimeError(f"no such op on rank {failing}")
        return OneShotSum(torch.empty(0), lambda part, out: None, lambda n: [])

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        if failing is not None:
            patch.setattr(world, "_device_name", lambda device: (True, "host", str(os.getpid())))
            patch.setattr(dist, "is_nccl_available", lambda: True)
            patch.setattr(World, "_new_group", lambda self, ranks: dist.new_group(list(ranks)))
            patch.setattr(world, "one_shot_refusal", lambda places: None)
            patch.setattr(OneShotSum, "meet", meet)
        with join_world(tp=2, sums="one_shot") as joined:
            is_one_shot = joined.tensor_parallel.one_shot is not None
    return [str(w.message) for w in warned if "one shot" in str(w.message)], is_one_shot


def sum_on_gpus(way: str) -> bool:
    """Whether two ranks on GPUs of their own add up in one shot; fails where a sum is wrong."""
    with join_world(tp=2, device="cuda", sums=way) as joined:
        ranks = joined.tensor_parallel
        ranks.connect(joined.device)
        for shape in SHAPES:
            for dtype in DTYPES:
                _check_sums(ranks, joined.device, shape, dtype)
        return ranks.one_shot is not None


def _check_sums(ranks: TensorParallel, device: torch.device, shape, dtype) -> None:
    """One after the other, and three in a graph: each is the exact sum, rounded once."""
    values = [_summands(index, shape, dtype).to(device) for index in range(2)]
    golden = (values[0].double() + values[1].double()).to(dtype)
    own = values[ranks.index]
    assert torch.equal(torch.stack([ranks.add_up(x.clone()) for x in own]), golden)
    inputs = torch.zeros_like(own[:3])

    def launch() -> None:
        for x in inputs:
            ranks.add_up(x)

    launch()
    replay = capture(launch, device)
    sums = torch.empty_like(own)
    for i in range(0, NUM_SUMS, 3):
        inputs.copy_(own[i : i + 3])
        replay()
        sums[i : i + 3] = inputs
    assert torch.equal(sums, golden)


def _summands(index: int, shape, dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(NUM_SUMS, *shape, generator=generator).to(dtype)
