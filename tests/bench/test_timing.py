"""Statistics, sizes of cold runs and the error measure; times themselves are not tested."""

import math
import weakref

import pytest
import torch

from fastshard.bench.timing import (
    MAX_NODES,
    GraphRun,
    Timing,
    cold_sets,
    num_calls,
    num_nodes,
    num_sets,
    peak_bytes,
    relative_error,
)
from helpers import CUDA_ONLY

MIB = 2**20


def test_median_and_percentiles():
    samples = [100.0, 1.0, 5.0, 2.0, 4.0, 3.0, 9.0, 8.0, 7.0, 6.0, 10.0]
    assert Timing.of(samples) == Timing(us=6.0, p20=3.0, p80=9.0, n=11)
    assert Timing.of([7.0]) == Timing(us=7.0, p20=7.0, p80=7.0, n=1)
    assert Timing.of([4.0, 1.0]) == Timing(us=2.5, p20=1.0, p80=4.0, n=2)


@pytest.mark.parametrize(
    ("num_bytes", "sets"), [(4 * MIB, 90), (32 * MIB, 12), (360 * MIB, 1), (10**10, 1)]
)
def test_inputs_are_six_times_the_l2(num_bytes, sets):
    assert num_sets(num_bytes, 60 * MIB) == sets


@pytest.mark.parametrize(
    ("num_bytes", "nodes"),
    [(1000, 256), (4 * MIB, 256), (32 * MIB, 59), (99_000_000, 20), (10**8, 20), (10**10, 4)],
)
def test_a_graph_reads_two_gigabytes(num_bytes, nodes):
    assert num_nodes(num_bytes) == nodes


@pytest.mark.parametrize(
    ("num_bytes", "l2_bytes", "sets", "calls"),
    [
        (1000, 60 * MIB, MAX_NODES, MAX_NODES),
        (4 * MIB, 60 * MIB, 90, 256),
        (32 * MIB, 60 * MIB, 12, 59),
        (32 * MIB, 512 * MIB, 96, 96),
        (10**10, 60 * MIB, 1, 4),
    ],
)
def test_each_call_finds_its_inputs_cold(num_bytes, l2_bytes, sets, calls):
    assert cold_sets(num_bytes, l2_bytes) == (sets, calls)


@pytest.mark.parametrize(
    ("seconds", "calls"), [(1e-4, 8), (0.001, 8), (0.002, 5), (0.004, 2), (0.5, 2)]
)
def test_a_burst_is_ten_milliseconds(seconds, calls):
    assert num_calls(seconds) == calls


@CUDA_ONLY
@pytest.mark.parametrize("num_programs", [None, 5])
def test_the_read_kernel_reads_everything(device, num_programs):
    read_kernel = pytest.importorskip("fastshard.bench.read_kernel", exc_type=ImportError)
    x = torch.randint(-(2**31), 2**31 - 1, (256 * 41 + 16,), dtype=torch.int32, device=device)
    sums = torch.full((100,), 7, dtype=torch.int32, device=device)
    read_kernel.read(x, sums, 64, 4, 2, num_programs)
    used = num_programs or 42
    difference = sums[:used].sum() - x.sum()  # int64 of sums that wrapped at 32 bits
    assert difference.item() % 2**32 == 0
    assert sums[used:].eq(7).all()


@CUDA_ONLY
def test_the_mma_kernel_multiplies(device):
    mma_kernel = pytest.importorskip("fastshard.bench.mma_kernel", exc_type=ImportError)
    words = torch.randint(-4, 5, (6, 2 * 64), device=device).bfloat16()  # small: sums are exact
    sums = torch.full((3, 64), torch.nan, device=device)
    flops = mma_kernel.multiply(words.view(torch.int32), sums, 5, 2)
    assert flops == 2 * 2 * 5 * mma_kernel.CHAINS * 2 * 16 * 16 * 8
    # Fragments of m16n8k16: of lane l row l // 4 and columns 2 * (l % 4) and the next of a quarter.
    parts = words.view(6, 2, 8, 8).double()
    left = torch.cat([parts[[0, 2]].movedim(0, 2), parts[[1, 3]].movedim(0, 2)], 1).flatten(2)
    right = parts[[4, 5]].movedim(0, 2).flatten(2)
    expected = (left @ right.mT).sum((1, 2)) * 5 * mma_kernel.CHAINS
    for block in range(2):
        assert sums[block].view(2, 32).double().sum(1).equal(expected)
    assert sums[2].isnan().all()


@CUDA_ONLY
def test_a_graph_keeps_the_tensors_of_its_calls(device):
    x, out = torch.ones(MIB, device=device), torch.zeros(MIB, device=device)
    inputs = weakref.ref(x)
    run = GraphRun(lambda i, x=x: out.add_(x), 2)
    del x
    assert inputs() is not None
    out.zero_()
    run()
    assert out.eq(2).all()
    del run
    assert inputs() is None


def test_peak_memory_is_that_of_a_gpu():
    assert peak_bytes(lambda: torch.empty(100), torch.device("cpu")) is None


@CUDA_ONLY
def test_peak_memory_is_what_a_call_adds(device):
    held = torch.empty(4 * MIB, device=device)
    assert (
        peak_bytes(lambda: [torch.empty(2 * MIB, device=device) for _ in "ab"], device) == 16 * MIB
    )
    assert peak_bytes(lambda: held.add_(1), device) == 0


def test_relative_error_by_hand():
    golden = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_error(golden.float(), golden) == 0
    assert relative_error(torch.tensor([[3.0, 4.5]]), golden) == pytest.approx(0.5 / 5)
    assert relative_error(torch.tensor([[-3.0, -4.0]]).half(), golden) == pytest.approx(2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_error(value):
    golden = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert math.isnan(relative_error(torch.tensor([3.0, value]), golden))


def test_rounding_is_seen_in_float64():
    golden = torch.full((1000,), 1 + 2**-12, dtype=torch.float64)
    assert relative_error(golden.bfloat16(), golden) == pytest.approx(2**-12, rel=1e-3)
