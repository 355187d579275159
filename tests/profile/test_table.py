"""What is made of recorded calls: costs by shapes, rows, and the share of the limit."""

import math

import pytest
import torch

import fastshard
from fastshard import ops
from fastshard.ops._library import COSTS, Cost
from fastshard.profile import limits, recorded, table
from fastshard.profile.recorded import Call, Kernel, Recording

MLP, NORM = Cost(1000, 10), Cost(600, 20)


def call(op, *kernels, cost=None):
    return Call(f"fastshard::{op}", 1.0, tuple(Kernel(*kernel) for kernel in kernels), cost)


def record(function):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        function()
    return recorded.read(profile.events()).calls


@pytest.mark.skipif(not recorded.RECORDS_DTYPES, reason="this torch records no dtypes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_costs_are_those_of_the_arguments(dtype):
    x, weight = torch.randn(3, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    bias, residual = torch.randn(32, dtype=dtype), torch.randn(3, 32, dtype=dtype)
    q, k = torch.randn(2, 3, 4, 16, dtype=dtype), torch.randn(2, 7, 2, 16, dtype=dtype)

    def run():
        ops.linear(x, weight)
        ops.linear(x, weight, bias, norm_weight=x[0].contiguous(), residual=residual)
        ops.attention(q, k, k, causal=True, window=4)
        ops.attention(q, k, k, mask=torch.ones(2, 3, 7, dtype=torch.bool))
        ops.act_and_mul(x, activation="gelu")
        ops.sample(x.float(), torch.zeros((), dtype=torch.int64))

    calls = [c for c in record(run) if c.op.startswith("fastshard::")]
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    assert [c.cost for c in calls] == [
        COSTS["linear"](x, weight, None, None, 1e-6, False, None),
        COSTS["linear"](x, weight, bias, x[0], 1e-6, False, residual),
        COSTS["attention"](q, k, k, None, True, None, None, 4, None, 1.0),
        COSTS["attention"](q, k, k, mask, False, None, None, None, None, 1.0),
        COSTS["act_and_mul"](x, "gelu", False),
        COSTS["sample"](x.float(), torch.zeros(()), 0, 1.0, 0, 1.0, 0.0),
    ]


@pytest.mark.skipif(not recorded.RECORDS_DTYPES, reason="this torch does not record dtypes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cost_of_a_step_counts_its_lists_of_weights(dtype):
    model = fastshard.load(device="cpu", dtype=dtype)
    calls = record(lambda: list(model.stream("def ", max_new_tokens=2, decode="persistent")))
    (cost,) = [call.cost for call in calls if call.op == "fastshard::decode_step"]
    weights = sum(tensor.numel() for tensor in model.model.state_dict().values())
    cache = model.model.any_cache.k_cache
    keys_and_values = 2 * 5 * (cache.numel() + cache[:, :, 0].numel())  # all read, one written
    row, vocab_size = 256, 2048
    size = (weights + keys_and_values + row) * dtype.itemsize
    assert cost.bytes == size + 4 * vocab_size


def test_only_outermost_calls_are_counted():
    x = torch.randn(3, 64)
    with torch.profiler.profile() as profile, torch.profiler.record_function("a range"):
        ops.linear(x, x)
        x + x
    calls = recorded.read(profile.events()).calls
    assert [(c.op, c.cost) for c in calls] == [("fastshard::linear", None), ("aten::add", None)]


def rows_by_name(rows):
    return {row.name: (row.calls, row.us, dict(row.costs)) for row in rows}


def test_replays_count_where_one_op_ran_the_kernel_at_one_cost():
    recording = Recording(
        [
            call("fused_mlp", ("Memset (Device)", 0.5), ("mlp", 5.0), cost=MLP),
            call("fused_mlp", cost=MLP),  # into a graph
            call("rms_norm", ("norm", 1.0), cost=NORM),
            call("rms_norm", ("norm", 3.0), cost=Cost(9, 9)),  # of another shape
            call("linear", ("gemm", 2.0), ("sum", 1.0), cost=NORM),
            call("sample", ("shared", 1.0), cost=NORM),
            Call("aten::add", 1.0, (Kernel("shared", 1.0),), None),
        ],
        [
            *(Kernel("mlp", us) for us in (5.0, 6.0, 7.0)),
            *(Kernel("norm", us) for us in (1.0, 3.0, 8.0)),
            *(Kernel("gemm", us) for us in (2.0, 4.0)),
            *(Kernel("shared", us) for us in (1.0, 1.0, 1.0)),
            Kernel("sum", 1.0),
            Kernel("Memcpy", 2.0),
            *(Kernel("Memset (Device)", 0.5) for _ in range(4)),  # of whom, nobody knows
        ],
    )
    assert rows_by_name(table.op_rows_on_gpu(recording)) == {
        "fastshard::fused_mlp": (3, 18.5, {MLP: 3}),
        "fastshard::rms_norm": (2, 4.0, {NORM: 1, Cost(9, 9): 1}),
        "fastshard::linear": (1, 3.0, {NORM: 1}),
        "fastshard::sample": (1, 1.0, {NORM: 1}),
    }


def test_lines_of_a_gpu():
    recording = Recording(
        [
            call("fused_mlp", ("void mlp_kernel<__half, 8>(Params)", 40.0), cost=MLP),
            call("new_op", ("other", 10.0)),
        ],
        [
            Kernel("void mlp_kernel<__half, 8>(Params)", 40.0),
            Kernel("void mlp_kernel<__half, 8>(Params)", 30.0),
            Kernel("other", 10.0),
            Kernel("Memcpy HtoD (Pageable -> Device)", 20.0),
        ],
    )
    seen = []

    def limit_us(op, cost):
        seen.append((op, cost))
        return 28.0

    lines = list(table.lines(recording, limit_us=limit_us))
    assert [" ".join(line.split()) for line in lines[:-1]] == [
        "calls total ms mean us share kernel",
        "2 0.070 35.00 70.0% mlp_kernel<__half, 8>",
        "1 0.020 20.00 20.0% Memcpy HtoD (Pageable -> Device)",
        "1 0.010 10.00 10.0% other",
        "",
        "calls total ms mean us share % limit op of fastshard (time of its kernels)",
        "2 0.070 35.00 70.0% 80.0% fastshard::fused_mlp",
        "1 0.010 10.00 10.0% - fastshard::new_op",
    ]
    assert lines[-1] == table.NOTE
    assert set(seen) == {("fused_mlp", MLP)}
    without = list(table.lines(recording))
    assert not any("% limit" in line for line in without)


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        (
            "void fastshard::f<(bool)1, fastshard::C<4>>(P)",
            "fastshard::f<(bool)1, fastshard::C<4>>",
        ),
        ("void (anonymous namespace)::g<int>(int*)", "(anonymous namespace)::g<int>"),
        ("void at::native::(anonymous namespace)::h(int)", "at::native::(anonymous namespace)::h"),
        ("Memset (Device)", "Memset (Device)"),
        ("ampere_bf16_s16816gemm_64x64", "ampere_bf16_s16816gemm_64x64"),
    ],
)
def test_short_names_lose_result_and_parameters(kernel, short):
    assert table.short_name(kernel) == short


class Known:
    """Limits as if measured: reads of 2000, copies of 1000 GB/s, 100 TFLOP/s."""

    node_us = 1.5

    def __init__(self, device, stopwatch):
        self.sizes = []

    def read(self, num_bytes):
        self.sizes.append(num_bytes)
        return limits_of(2000.0)

    def copy(self, num_bytes):
        self.sizes.append(num_bytes)
        return limits_of(1000.0)

    def us(self, limit, num_bytes, flops):
        assert limit == "mma"
        return flops / 100 / 1e6


def limits_of(gbps):
    from fastshard.bench.limits import TrafficLimit

    return TrafficLimit(1, 1.0, gbps, "test")


def test_the_limit_is_the_slowest_of_traffic_operations_and_an_empty_kernel(monkeypatch):
    monkeypatch.setattr(limits, "Limits", Known)
    monkeypatch.setattr(limits, "Stopwatch", lambda device, **settings: None)
    of = limits.OpLimits(torch.device("cpu"))
    assert of.us("linear", Cost(20_000_000, 0)) == pytest.approx(10)
    assert of.us("rms_norm", Cost(20_000_000, 0)) == pytest.approx(20)
    assert of.us("linear", Cost(20_000_000, 10**10)) == pytest.approx(100)
    assert of.us("linear", Cost(0, 0)) == 1.5
    assert of._limits.sizes == [2**24, 2**24, 2**24, 2**20]
    assert all(math.log2(size).is_integer() for size in of._limits.sizes)


def test_every_op_of_a_copys_rate_is_there():
    assert set(limits.WRITES_AS_MUCH) < set(COSTS)
