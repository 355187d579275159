"""decode_step of ranks that share the layers: their steps are the whole model's."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from decode_cases import Case, cast, make, plain
from decode_rank_programs import PROCESSES, calls_of, emulated_rank, part_of, steps
from torch import Tensor

from fastshard import ops
from helpers import CPU_ONLY, KERNELS_ONLY, assert_as_accurate

NUM_STEPS = 3
SIZES = {"num_heads": 6, "num_kv_heads": 6, "intermediate_size": 48, "vocab_size": 66}
CASES = {
    "plain": Case(**SIZES),
    "one-row": Case(**SIZES, slots=(0,)),
    "biases": Case(**SIZES, qkv_bias=True, output_bias=True),
    "qk-norm": Case(**SIZES, qk_norm=True, slots=(9, 4, 0, 7)),
    "tied": Case(**SIZES, is_tied=True),
    "first": Case(**SIZES, part="first"),
    "middle": Case(**SIZES, part="middle", windows=(0, 3, 0)),
    "last": Case(**SIZES, part="last", windows=(0,)),
    "long-rows": Case(
        **SIZES | {"intermediate_size": 6 * 2064}, part="middle", windows=(0,), hidden_size=1032
    ),
    "group-2": Case(**SIZES | {"num_heads": 12}, head_dim=96),
}


@pytest.fixture(scope="module")
def run_emulated():
    """Run the steps of all ranks, of which the first is this process."""
    with ExitStack() as stack:
        others = []

        def run(parts: list[dict], xs: list[Tensor]) -> list[list[Tensor]]:
            while len(others) < len(parts) - 1:
                mine, other = PROCESSES.Pipe()
                process = PROCESSES.Process(target=emulated_rank, args=(other,), daemon=True)
                process.start()
                other.close()
                stack.callback(process.join)
                stack.callback(mine.close)
                others.append(mine)
            asked = list(zip(others, parts[1:], strict=False))
            for connection, part in asked:
                connection.send((part, xs))
            return [steps(parts[0], xs), *(connection.recv() for connection, _ in asked)]

        yield run


def run_on_gpus(parts: list[dict], xs: list[Tensor]) -> list[list[Tensor]]:
    """All ranks in this process. Between the first launch and the last there is nothing else.

    An allocation might wait for a launch, which waits for that of another rank.
    """
    calls = [calls_of(part, xs) for part in parts]
    for i in range(len(parts)):
        torch.cuda.synchronize(i)
    for i in range(len(xs)):
        for rank in calls:
            ops.decode_step(**rank[i])
    return [[call["out"].cpu() for call in rank] for rank in calls]


def memory_of(devices: list[torch.device], hidden_size: int) -> list[Tensor]:
    size = ops.decode_rank_sums_size(len(devices), hidden_size)
    memory = [torch.zeros(size, dtype=torch.int64, device=device) for device in devices]
    if devices[0].type == "cpu":
        return [words.share_memory_() for words in memory]
    for words in memory:  # the first copy between two GPUs lets each access the other's memory
        for other in memory:
            words[:1].copy_(other[:1])
    return memory


def expected(given: dict, xs: list[Tensor]) -> list[Tensor]:
    outs = []
    for i, x in enumerate(xs):
        now = {"x": x if x.dtype == torch.int64 else x.to(given["weights"].sa_norm[0].dtype)}
        now |= {name: given[name] + i for name in ("slots", "positions")}
        outs.append(plain(given | now))
    return outs


def ranks_of(case: str) -> list:
    """Numbers of ranks and dtypes of a case: two in bfloat16, and two or three in float16."""
    count = list(CASES).index(case)
    return [(2, torch.bfloat16), (2 + count % 2, torch.float16)]


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("case", "num_ranks", "dtype"),
    [
        pytest.param(case, *each, id=f"{name}-{each[0]}-{each[1]}")
        for name, case in CASES.items()
        for each in ranks_of(name)
    ],
)
def test_ranks_give_what_one_gives(case, num_ranks, dtype, device, run_emulated):
    run: Callable = run_emulated
    devices = [torch.device("cpu")] * num_ranks
    if device.type == "cuda":
        if torch.cuda.device_count() < num_ranks:
            pytest.skip(f"there are not {num_ranks} GPUs")
        run, devices = run_on_gpus, [torch.device("cuda", i) for i in range(num_ranks)]
    given = make(case, dtype, torch.device("cpu"))
    xs = [given["x"], *(given["x"].flip(0) for _ in range(NUM_STEPS - 1))]
    memory = memory_of(devices, case.hidden_size)
    parts = [
        cast(part_of(given, rank, num_ranks), dtype, at)
        | {"rope_table": given["rope_table"].to(at), "rank_sums": memory}
        for rank, at in enumerate(devices)
    ]
    for part in parts:
        if part["weights"].head is not None:
            part["out"] = part["out"].float()
    golden = expected(cast(given, torch.float64), xs)
    given["rope_table"] = given["rope_table"].to(dtype)
    naive = expected(given, xs)
    outs = run(parts, xs)
    for step in range(NUM_STEPS):
        ranks = [out[step] for out in outs]
        if given["weights"].head is None:
            assert all(torch.equal(out, ranks[0]) for out in ranks[1:])
            actual = ranks[0]
        else:
            actual = torch.cat(ranks, dim=1)
        assert_as_accurate(actual, golden[step], naive[step].to(actual.dtype))
    assert all(part["overflow"].item() == 0 for part in parts)


def given_with(device, **changes) -> dict:
    given = part_of(make(Case(**SIZES), torch.float32, device), 0, 2)
    memory = memory_of([device] * 2, 72)
    return given | {"rank_sums": memory} | changes


@CPU_ONLY
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank_sums": [], "rank": 1}, "rank must be 0 without rank_sums, got 1"),
        ({"rank": 2}, "rank must be 0 to 1, got 2"),
        ({"rank": -1}, "rank must be 0 to 1, got -1"),
        ({"rank_sums": [torch.zeros(9)]}, "rank_sums must be of 2 to 8 ranks, or none, got 1"),
        ({"rank_sums": [torch.zeros(9)] * 9}, "rank_sums must be of 2 to 8 ranks, or none, got 9"),
        (
            {"rank_sums": [torch.zeros(9, dtype=torch.int64)] * 2},
            r"rank_sums\[0\] must be contiguous \[2320\], got shape \[9\]",
        ),
    ],
)
def test_memory_that_is_refused(changes, text, device):
    with pytest.raises(ValueError, match=text):
        ops.decode_step(**given_with(device, **changes))


@CPU_ONLY
def test_memory_of_another_dtype_is_refused(device):
    memory = [torch.zeros(2320, dtype=torch.int32)] * 2
    with pytest.raises(TypeError, match=r"rank_sums\[0\] must be torch.int64, got torch.int32"):
        ops.decode_step(**given_with(device, rank_sums=memory))


@CPU_ONLY
def test_the_head_is_a_part(device):
    given, whole = given_with(device), make(Case(**SIZES), torch.float32, device)
    given["weights"] = replace(given["weights"], head=whole["weights"].head)
    with pytest.raises(
        ValueError, match=r"head must be contiguous \[33, 72\], got shape \[66, 72\]"
    ):
        ops.decode_step(**given)


@CPU_ONLY
def test_a_cpu_has_no_ranks(device):
    with pytest.raises(RuntimeError, match="decode_step: ranks share layers on GPUs only, got cpu"):
        ops.decode_step(**given_with(device))
