"""The emulator itself: each primitive against its definition, each fault against its error."""

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulator.build import (
    CSRC,
    HERE,
    build_library,
    compiler,
    cuda_include,
    only_builder,
)
from helpers import emulator_tools

pytestmark = pytest.mark.emulator
NAN = float("nan")
SEED = "FASTSHARD_EMULATOR_SEED"


@pytest.fixture(scope="module", params=["", "-DFS_EMULATOR_UCONTEXT"], ids=["asm", "ucontext"])
def library(request, tmp_path_factory):
    """kernels/primitives.cu, with either way to switch fibers."""
    path = tmp_path_factory.mktemp("emulator") / "primitives.so"
    sources = [HERE / "kernels" / "primitives.cu"]
    with emulator_tools():
        return ctypes.CDLL(str(build_library(path, sources, flags=request.param.split())))


@pytest.fixture(autouse=True)
def _ascending_schedule(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv(SEED, raising=False)
    monkeypatch.delenv("FASTSHARD_EMULATOR_SMS", raising=False)


@pytest.fixture(params=["", "0", "1", "2"], ids=["ascending", "seed0", "seed1", "seed2"])
def _every_schedule(request, monkeypatch):
    monkeypatch.setenv(SEED, request.param)


@pytest.fixture
def run(library):
    """Calls a kernel by its exported name; raises what its launch threw."""

    def call(name: str, *args: Tensor | int) -> None:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        pointers = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args)
        error = function(*pointers)
        if error is not None:
            raise RuntimeError(error.decode())

    return call


def functions_of(header: Path) -> set[str]:
    """Name and parameters of every function of a header that is not in a `detail` namespace."""
    text = re.sub(r"//[^\n]*", "", header.read_text())
    text = re.sub(r"\nnamespace \w*(_detail|::simt) \{.*?\n\}", "", text, flags=re.S)
    text = re.sub(r"\s+", " ", text)
    parameters = r"\((?:[^(){};]|\([^()]*\))*\)"
    found = re.findall(rf"\b[\w:]+ (\w+)(?:<\w+>)?({parameters}) \{{", text)
    return {name + parameters for name, parameters in found if name != "if"}


@pytest.mark.parametrize(("name", "least"), [("ptx.cuh", 10), ("launch.cuh", 5)])
def test_twins_have_the_functions_of_csrc(name, least):
    product = functions_of(CSRC / "common" / name)
    assert len(product) >= least
    assert functions_of(HERE / "include" / "common" / name) == product


@pytest.mark.usefixtures("_every_schedule")
def test_indices(run):
    out = torch.full((24, 40, 4), -1, dtype=torch.int32)
    run("indices", out, 2, 3, 4, 40)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(2), indexing="ij")
    blocks = torch.stack([x, y, z], -1).reshape(24, 1, 3).expand(24, 40, 3)
    assert torch.equal(out[..., :3].long(), blocks)
    assert torch.equal(out[..., 3].long(), torch.arange(40).expand(24, 40))


def mma_registers(a, b, c, golden):
    """Registers of each lane as in the PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    a_registers, b_registers, d, expected = [], [], [], []
    for lane in range(32):
        row, low = lane // 4, slice(lane % 4 * 2, lane % 4 * 2 + 2)
        high = slice(low.start + 8, low.stop + 8)
        a_registers += [a[row, low], a[row + 8, low], a[row, high], a[row + 8, high]]
        b_registers += [b[low, row], b[high, row]]
        d += [c[row, low], c[row + 8, low]]
        expected += [golden[row, low], golden[row + 8, low]]
    return map(torch.cat, (a_registers, b_registers, d, expected))


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_mma(run, dtype):
    a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in [(16, 16), (16, 8)])
    c = torch.randn(16, 8)
    a, b, d, expected = mma_registers(a, b, c, c.double() + a.double() @ b.double())
    run(f"mma_{dtype}", a, b, d)
    # 17 float32 additions of values below 32
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=17 * 32 * 2**-24)


def test_mma_fp16(run):
    # Sums of integers below 2^24 are exact in float32, and rounded once to float16 from 2048 on.
    a, b = (torch.randint(-99, 100, shape).half() for shape in [(16, 16), (16, 8)])
    c = torch.randint(-2048, 2048, (16, 8)).half()
    a, b, c, expected = mma_registers(a, b, c, (c.double() + a.double() @ b.double()).half())
    d = torch.zeros_like(c)
    run("mma_fp16", a, b, c, d)
    assert (d.abs() > 2048).any()
    assert torch.equal(d, expected)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(run, trans):
    x = torch.arange(32 * 8, dtype=torch.int16)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    run("ldmatrix", x, out, int(trans), 0)
    matrices = x.view(4, 8, 8)
    if trans:
        matrices = matrices.transpose(1, 2)
    # lane l holds elements 2 * (l % 4) and the next of row l / 4 of each matrix
    assert torch.equal(out, matrices.reshape(4, 32, 2).transpose(0, 1))


def test_ldmatrix_checks_its_addresses(run):
    x, out = torch.zeros(32 * 8, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"ldmatrix: byte \d+ of shared memory is not align"):
        run("ldmatrix", x, out, 0, 8)
    with pytest.raises(RuntimeError, match=r"ldmatrix.trans: byte 512 is outside the 512 of"):
        run("ldmatrix", x, out, 1, 16)


@pytest.mark.usefixtures("_every_schedule")
@pytest.mark.parametrize("dtype", ["int32", "float32", "int64"])
def test_shuffles(run, dtype):
    x = torch.arange(100, 132, dtype=getattr(torch, dtype))
    out = torch.zeros(7, 32, dtype=x.dtype)
    run(f"shuffle_{dtype}", x, out)
    lanes = range(32)
    sources = [
        [lane ^ 5 for lane in lanes],
        [5 for _ in lanes],  # 37 modulo the width
        [lane // 8 * 8 + 3 for lane in lanes],
        [lane - 3 if lane % 16 >= 3 else lane for lane in lanes],
        [lane + 3 if lane % 16 < 13 else lane for lane in lanes],
        [lane + 20 if lane < 12 else lane for lane in lanes],
        [lane ^ 1 for lane in lanes],
    ]
    assert torch.equal(out, x[torch.tensor(sources)])


@pytest.mark.usefixtures("_every_schedule")
@pytest.mark.parametrize("values", [[1, 1], [0, 3], [1, 3], [0, 0]], ids=str)
def test_votes(run, values):
    x = torch.tensor(values, dtype=torch.int32).repeat(32)  # a value for even lanes, one for odd
    x[:32] = 1  # warp 0 is all ones
    out = torch.zeros(6, 64, dtype=torch.int32)
    run("vote", x, out)
    ballots = [-1, (0x55555555 if values[0] else 0) + (0xAAAAAAAA if values[1] else 0)]
    ballots = torch.tensor(ballots).to(torch.int32).repeat_interleave(32)
    assert torch.equal(out[0], ballots)
    warps = x.view(2, 32)
    assert torch.equal(out[1].bool(), (warps > 2).any(1).repeat_interleave(32))
    assert torch.equal(out[2].bool(), (warps > 0).all(1).repeat_interleave(32))
    assert out[3].tolist() == [int((x > 2).any())] * 64
    assert out[4].tolist() == [int((x > 0).all())] * 64
    assert out[5].tolist() == [int((x > 0).sum())] * 64


@pytest.mark.usefixtures("_every_schedule")
def test_exited_lanes_are_not_waited_for(run):
    out = torch.zeros(40, dtype=torch.int32)
    run("exited_lanes", out, 40, 0)
    expected = torch.tensor([0x77777777] * 32 + [0x77] * 8, dtype=torch.int32)
    expected[3::4] = 0
    assert torch.equal(out, expected)


def test_mma_needs_all_lanes(run):
    with pytest.raises(RuntimeError, match="mma needs all 32 lanes of a warp, and some have exit"):
        run("exited_lanes", torch.zeros(32, dtype=torch.int32), 32, 1)


@pytest.mark.usefixtures("_every_schedule")
def test_atomics(run):
    i, f = torch.zeros(6, dtype=torch.int32), torch.zeros(1)
    u = torch.zeros(1, dtype=torch.int64)
    run("atomics", i, f, u)
    assert i[:4].tolist() == [3 * 64 * 2, 62, -63, 0xFF]
    assert i[4] == i[5] != 0  # the first block to swap is the one that stores
    assert f.item() == 3 * 64 * 0.5
    assert u.item() == 3 * 64 * 2**33


@pytest.mark.usefixtures("_every_schedule")
def test_blocks_that_spin_take_turns(run):
    out = torch.full((8,), -1, dtype=torch.int32)
    run("ticket", torch.zeros(1, dtype=torch.int32), out, 8, 1)
    assert out.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("pending", "landed"), [(0, 8), (1, 4), (-1, 0)])
def test_copies_land_at_their_wait(run, pending, landed):
    x, out = torch.arange(8.0), torch.zeros(8)
    run("copy", x, out, pending, 1)
    assert torch.equal(out[:landed], x[:landed])
    assert out[landed:].isnan().all()


def test_copies_may_land_before_their_wait(run, monkeypatch):
    landed = set()
    for seed in range(16):
        monkeypatch.setenv(SEED, str(seed))
        out = torch.zeros(8)
        run("copy", torch.arange(8.0), out, -1, 1)
        landed.add(tuple(out.view(2, 4).isfinite().all(1).tolist()))
    assert landed == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.usefixtures("_every_schedule")
def test_copies_of_zeros(run):
    out = torch.full((8,), NAN)
    run("copy", torch.full((8,), NAN), out, 0, 0)
    assert torch.equal(out, torch.zeros(8))


def test_copies_check_their_addresses(run):
    x = torch.zeros(64)
    start = -x.data_ptr() % 16 // 4
    with pytest.raises(RuntimeError, match=r"cp.async: byte 4 of shared memory is not aligned"):
        run("misaligned_copy", x, 4, start)
    with pytest.raises(RuntimeError, match=r"cp.async: byte 32 is outside the 32 of shared m"):
        run("misaligned_copy", x, 32, start)
    with pytest.raises(RuntimeError, match=r"global address 0x\w+ is not aligned to 16 bytes"):
        run("misaligned_copy", x, 0, start + 1)


def test_blocks_that_wait_for_each_other_must_be_resident(run, monkeypatch):
    next_turn, out = torch.zeros(1, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="livelock: threads spin and none gets anywhere"):
        run("ticket", next_turn, out, 8, 0)
    next_turn.zero_()
    with pytest.raises(RuntimeError, match="cooperative launch of 9 blocks, more than are resid"):
        run("ticket", next_turn, out, 9, 1)
    monkeypatch.setenv("FASTSHARD_EMULATOR_SMS", "5")
    run("ticket", next_turn, out, 9, 1)
    assert out.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_resident_blocks(run, monkeypatch):
    blocks = torch.zeros(2, dtype=torch.int32)
    for sms, threads, expected in [(4, 128, [8, 4]), (3, 1024, [3, 3])]:
        monkeypatch.setenv("FASTSHARD_EMULATOR_SMS", str(sms))
        run("resident_blocks", blocks, threads)
        assert blocks.tolist() == expected


def test_shared_memory_is_poisoned_before_every_block(run):
    out = torch.zeros(256, dtype=torch.uint8)
    run("poison", out, 256)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert out.view(dtype).isnan().all()


@pytest.mark.usefixtures("_every_schedule")
def test_a_barrier_orders_warps(run):
    x, out = torch.randn(2, 64), torch.zeros(2, 64)
    run("maximum", x, out, 1, 1)
    assert torch.equal(out, x.amax(1, keepdim=True).expand(2, 64))


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_missing_barrier_shows(run, monkeypatch, before, after):
    wrong = []
    for seed in ["", *map(str, range(8))]:
        monkeypatch.setenv(SEED, seed)
        x, out = torch.arange(128.0).view(2, 64), torch.zeros(2, 64)  # all maxima differ
        run("maximum", x, out, before, after)
        wrong.append(not torch.equal(out, x.amax(1, keepdim=True).expand(2, 64)))
    assert sum(wrong) >= 3


def test_a_seed_finds_a_race_that_the_ascending_order_hides(run, monkeypatch):
    expected, hits = torch.arange(32, dtype=torch.int32), []
    for seed in ["", *map(str, range(8))]:
        monkeypatch.setenv(SEED, seed)
        first, second = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        run("ascending_race", first)
        run("ascending_race", second)
        assert torch.equal(first, second)  # a seed fixes the schedule
        hits.append(not torch.equal(first, expected))
    assert hits[0] is False
    assert any(hits)


@pytest.mark.usefixtures("_every_schedule")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, r"deadlock: all threads wait; block \(0, 0, 0\):.* at __shfl_sync"),
        (1, r"lanes of a warp disagree: (__ballot_sync|__syncwarp) with the mask 0xffffffff"),
        (2, r"__shfl_sync with the mask 0xfffffff0, which lacks the calling lane in thread "),
        (3, r"threads of a block disagree: __syncthreads(_or)?, others __syncthreads"),
        (4, r"__trap in thread \d+ of block \(0, 0, 0\) of the kernel with shared memory void"),
    ],
)
def test_divergence_is_an_error(run, kind, message):
    with pytest.raises(RuntimeError, match=f"emulator: {message}"):
        run("divergence", kind)
    out = torch.zeros(6, 64, dtype=torch.int32)  # and the next launch works
    run("vote", torch.ones(64, dtype=torch.int32), out)
    assert out[5].tolist() == [64] * 64


def test_spinning_for_ever_is_an_error(run):
    with pytest.raises(RuntimeError, match="livelock: threads spin and none gets anywhere"):
        run("livelock", torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("kind", "index", "message"),
    [
        (0, 8, r"primitives.cu:\d+: index 8 out of bounds"),
        (0, -1, r"primitives.cu:\d+: index -1 out of bounds"),
        (1, 8, "a write past the end of the shared memory of a block"),
        (1, -1, "a write before the start of the shared memory of a block"),
        (2, 1, r"vec.cuh:\d+: misaligned address 0x\w+"),
    ],
)
def test_overflow_of_shared_memory_is_an_error(run, kind, index, message):
    with pytest.raises(RuntimeError, match=message):
        run("overflow", kind, index)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(0, "illegal access to the address 0x10 in thread 0"), (1, "integer division by zero")],
)
def test_traps_are_errors(run, kind, message):
    for _ in range(2):  # the next launch works
        with pytest.raises(RuntimeError, match=message):
            run("trap", kind)


def test_launch_errors(run):
    with pytest.raises(RuntimeError, match="SharedStorage has 256 bytes, its launch 32"):
        run("wrong_storage")
    with pytest.raises(RuntimeError, match=r"invalid launch: grid \(0, 1, 1\), 32 threads"):
        run("empty_grid")


def test_arithmetic(run):
    i = torch.zeros(6, dtype=torch.int32)
    u, f = torch.zeros(6, dtype=torch.int32), torch.full((6,), NAN)
    run("arithmetic", i, u, f)
    assert i.tolist() == [-3, 2, 8, 31, 4, -0x40800000]
    assert u.tolist() == [3, 0x3F800000, -1, -0x80000000, 3, -3]
    assert f.tolist() == [0.5, 2.0, 8.0, 0.0, 1.0, 2.0]


FIXTURE_TESTS = """
import pytest
import torch
from fastshard import ops
from fastshard.ops._library import define

define("without_kernel(Tensor x) -> Tensor")
torch.library.impl("fastshard::without_kernel", "cpu")(lambda x: x.clone())


def test_calls_an_op(device):
    ops.rms_norm(torch.ones(1, 8, device=device), torch.ones(8, device=device))


def test_calls_no_op(device):
    torch.ones(2, device=device)


def test_expects_an_error(device):
    with pytest.raises(ValueError, match="rows of"):
        ops.rms_norm(torch.ones(1, 7, device=device), torch.ones(7, device=device))


def test_calls_an_op_without_a_kernel(device):
    torch.ops.fastshard.without_kernel(torch.ones(2, device=device))


@pytest.mark.large
def test_is_too_large(device):
    ops.rms_norm(torch.ones(1, 8, device=device), torch.ones(8, device=device))
"""


def test_device_fixture_proves_that_a_kernel_ran(tmp_path):
    with emulator_tools():
        compiler(), cuda_include()
    (tmp_path / "test_fixture.py").write_text(FIXTURE_TESTS)
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE.parent.parent / "pyproject.toml"), "-p", "conftest"]
    command += ["-k", "emulator", str(tmp_path)]
    environment = dict(os.environ, FASTSHARD_REQUIRE_EMULATOR="0")  # 1 would fail what is skipped
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    output = run.stdout
    results = dict(re.findall(r"::(\w+)\[emulator\] (\w+)", output))
    assert results == {
        "test_calls_an_op": "PASSED",
        "test_calls_no_op": "ERROR",
        "test_expects_an_error": "PASSED",
        "test_calls_an_op_without_a_kernel": "SKIPPED",
    }
    assert "the test called no emulated op" in output
    assert "csrc has no kernel of without_kernel" in output


def test_builders_of_one_cache_take_turns(tmp_path):
    entered = threading.Event()

    def build_beside():
        with only_builder(tmp_path):
            entered.set()

    with only_builder(tmp_path):
        other = threading.Thread(target=build_beside)
        other.start()
        assert not entered.wait(0.2)
    other.join(60)
    assert entered.is_set()
