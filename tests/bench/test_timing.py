"""Statistics, sizes of cold runs and the error measure; times themselves are not tested."""

import math

import pytest
import torch

from fastshard.bench.timing import Timing, num_calls, num_nodes, num_sets, relative_error
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
