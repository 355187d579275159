"""The machine code of kernels: what is read of a compiled library, and what follows from it."""

import collections
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastshard import cli, ops
from fastshard.bench import kernels, machine_code
from fastshard.bench.machine_code import Kernel
from helpers import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
#include <cuda_fp16.h>
#include "common/launch.cuh"
#include "common/ptx.cuh"
struct Storage { float values[300]; };
template <typename T, int kRounds>
__global__ __launch_bounds__(96) void multiply_kernel(const uint32_t* in, float* out, int rounds) {
  FS_SHARED_STORAGE(Storage, smem);
  FS_EXTRA_SHARED_BYTES(16 * kRounds);
  float sums[4] = {};
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = in[i * 32 + threadIdx.x];
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) fastshard::ptx::mma_m16n8k16<T>(sums, a, a[i % 4], a[0]);
  }
  smem.values[threadIdx.x] = sums[0];
  __syncthreads();
  out[threadIdx.x] = smem.values[threadIdx.x ^ 1] + sums[1] + sums[2] + sums[3];
}
__global__ void spill_kernel(float* out, int index) {
  float values[64];
#pragma unroll 1
  for (int i = 0; i < 64; ++i) values[i * index % 64] = out[i];
  out[threadIdx.x] = values[index];
}
template __global__ void multiply_kernel<__half, 8>(const uint32_t*, float*, int);
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    nvcc = next(filter(shutil.which, ["/usr/local/cuda/bin/nvcc", "nvcc"]), None)
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("needs nvcc and g++")
    if not any(map(machine_code._has_tools, machine_code._tool_folders())):
        pytest.skip("needs cuobjdump and nvdisasm")
    folder = tmp_path_factory.mktemp("library")
    (folder / "kernels.cu").write_text(SOURCE)
    command = [nvcc, "-std=c++20", "-arch=sm_86", "-DFASTSHARD_CUDA_ARCHS=8.6", "-c"]
    command += [f"-I{ROOT / 'csrc'}", "kernels.cu", "-o", "kernels.o"]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "kernels.o"


def test_what_is_read_of_a_library(library):
    multiply, spill = machine_code.read_kernels(library)
    assert multiply.short_name == "multiply_kernel<fp16, 8>"
    assert spill.short_name == "spill_kernel"
    assert {multiply.arch, spill.arch} == {"sm_86"}
    assert (multiply.threads, spill.threads) == (96, None)
    assert (multiply.shared, spill.shared) == (300 * 4 + 16 * 8, 0)
    assert (multiply.stack, multiply.local_instructions) == (0, 0)
    assert spill.stack == 256
    assert spill.local_instructions > 0
    assert multiply.count(r"HMMA\.16816\.F32$") == 8
    assert 8 <= multiply.registers < 64
    assert multiply.loop["HMMA.16816.F32"] == 8
    assert 8 < multiply.loop.total() < multiply.instructions.total() / 2


def test_only_what_is_wanted(library):
    wanted = machine_code.read_kernels(library, lambda kernel: "spill" in kernel.name)
    assert [kernel.short_name for kernel in wanted] == ["spill_kernel"]


def test_where_a_tool_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "_tool_folders", lambda: iter([tmp_path]))
    (tmp_path / "cuobjdump").touch()  # without nvdisasm it disassembles nothing
    with pytest.raises(RuntimeError, match="cuobjdump and nvdisasm not found; pip install"):
        machine_code.cuobjdump("--version")


# By hand from the rules: 48 warps, 16 blocks, 65,536 registers in four parts, 102,400 bytes.
@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks", "occupancy"),
    [
        (128, 40, 0, 12, 1.0),  # warps
        (32, 16, 0, 16, 16 / 48),  # blocks
        (256, 255, 0, 1, 8 / 48),  # registers: two warps a part
        (96, 168, 0, 4, 12 / 48),  # three warps a part
        (96, 169, 0, 2, 6 / 48),  # 176 a thread as allocated: two, and 8 warps are two blocks
        (128, 64, 50176, 2, 8 / 48),  # shared memory: 49 KB and 1 of the system's
        (128, 64, 50177, 1, 4 / 48),
        (128, 64, 101376, 1, 4 / 48),
        (1024, 64, 0, 1, 32 / 48),
        (100, 16, 0, 12, 1.0),  # four warps
    ],
)
def test_occupancy(threads, registers, shared, blocks, occupancy):
    kernel = Kernel("f", "sm_86", registers, threads=threads, shared=shared)
    assert (kernel.blocks(), kernel.occupancy()) == (blocks, pytest.approx(occupancy))


def test_occupancy_that_is_unknown():
    assert Kernel("f", "sm_86", 32, threads=None).occupancy() is None
    assert Kernel("f", "sm_999", 32, threads=128).occupancy() is None


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void fastshard::norm_kernel<__nv_bfloat16, fastshard::RowConfig<16, 8>, false>"
            "(fastshard::NormParams)",
            "norm_kernel<bf16, RowConfig<16, 8>, false>",
        ),
        (
            "void fastshard::attention_kernel<__half, fastshard::AttentionConfig<64, true, "
            "(fastshard::AttentionRules)1> >(fastshard::AttentionParams)",
            "attention_kernel<fp16, AttentionConfig<64, true, kMaskBytes>>",
        ),
        ("void of_enum<(Color)3>(int, float*)", "of_enum<(Color)3>"),
        ("plain(int, float*)", "plain"),
    ],
)
def test_short_names(name, short):
    assert Kernel(name, "sm_86").short_name == short


def test_the_loop_is_the_shortest_with_most_tensor_core_instructions():
    code = [
        ("0000", "MOV", " R1, c[0x0][0x28] "),
        ("0010", "IADD3", " R2, R2, 0x1, RZ "),  # the outer loop begins
        ("0020", "HMMA.16816.F32", " R4, R8, R12, R4 "),  # the inner one
        ("0030", "HMMA.16816.F32", " R4, R8, R12, R4 "),
        ("0040", "BRA", " 0x20 "),
        ("0050", "FADD", " R1, R1, R1 "),
        ("0060", "BRA", " P0, 0x10 "),
        ("0070", "HMMA.16816.F32", " R4, R8, R12, R4 "),
        ("0080", "BRA", " 0x70 "),
        ("0090", "BRA", " 0xa0 "),  # forward
        ("00a0", "EXIT", " "),
        ("00b0", "BRA", " 0xb0 "),  # to itself, where code ends
    ]
    loop = machine_code._tensor_core_loop(code)
    assert loop == {"HMMA.16816.F32": 2, "BRA": 1}
    assert machine_code._tensor_core_loop(code[:2] + code[5:7]) == collections.Counter()


GEMM = Kernel(
    "gemm_kernel<__half, fastshard::GemmConfig<2, 4> >(P)",
    "sm_86",
    236,
    instructions=collections.Counter({"HMMA.16816.F32": 64, "FFMA": 5536}),
    loop=collections.Counter({"HMMA.16816.F32": 64, "LDSM": 192}),
    threads=256,
    shared=98304,
)
NORM = Kernel(
    "norm_kernel<float>(P)",
    "sm_86",
    32,
    16,
    instructions=collections.Counter({"LDL.64": 2, "STL": 1}),
)


def test_table():
    lines = machine_code.table([kernel.to_dict() for kernel in (GEMM, NORM)])
    title, header, gemm, norm, legend, note = lines
    assert title == "machine code for sm_86"
    assert gemm.split(maxsplit=11) == [
        *("256", "236", "96.0", "1", "17%", "0", "0", "5600", "64", "1%", "25%"),
        "gemm_kernel<fp16, GemmConfig<2, 4>>",
    ]
    expected = ["-", "32", "0.0", "-", "-", "16", "3", "3", "-", "-", "-", "norm_kernel<float>"]
    assert norm.split() == expected
    for line in (gemm, norm):
        assert line.index(line.split()[11]) == header.index("kernel")
        for name in ("threads", "registers", "shared KB", "occupancy", "instr.", "in loop"):
            end = header.index(name) + len(name)
            assert line[end - 1] != " "
            assert line[end] == " "
    assert legend.startswith("GemmConfig: RowWarps, ColumnWarps, ")
    assert "in loop: " in note
    assert machine_code.table([]) == []


def test_plain_values():
    facts = GEMM.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["shared_bytes"] == 98304
    assert facts["occupancy"] == pytest.approx(8 / 48)
    assert facts["hmma_share"] == pytest.approx(64 / 5600)
    assert facts["hmma_share_of_loop"] == 0.25


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.cuh")))


def test_the_legend_is_that_of_the_sources():
    found = {}
    pattern = r"template <([^<>]*)>\nstruct (\w+Config) \{"
    for parameters, name in re.findall(pattern, sources()):
        names = [parameter.split()[-1] for parameter in parameters.split(",")]
        found[name] = ", ".join(name.removeprefix("k").removesuffix("_") for name in names)
    assert found == machine_code.CONFIGS
    (rules,) = re.findall(r"enum class AttentionRules \{ (.*) \};", sources())
    numbers = {f"(AttentionRules){i}": rule for i, rule in enumerate(rules.split(", "))}
    assert numbers.items() <= machine_code.SHORT_NAMES.items()
    assert sum(name.startswith("(") for name in machine_code.SHORT_NAMES) == len(numbers)


def test_every_kernel_stands_behind_a_benchmark():
    found = set(re.findall(r"__global__ [^;{]*?\b(\w+_kernel)\(", sources()))
    assert set().union(*kernels.KERNELS.values()) == found - {"sample_kernel"}


def test_kernels_of_a_benchmark(monkeypatch):
    made = [
        Kernel(f"void fastshard::{name}<{dtype}>(fastshard::Params)", "sm_86")
        for name in ("gemm_kernel", "linear_kernel", "rms_norm_kernel")
        for dtype in ("__half", "__nv_bfloat16", "float")
    ]

    def read(library, is_wanted):
        assert library == Path("library")
        return list(filter(is_wanted, made))

    monkeypatch.setattr(kernels, "library", lambda: Path("library"))
    monkeypatch.setattr(machine_code, "read_kernels", read)

    def found(*arguments):
        compiled = kernels.describe(*arguments)
        assert compiled["missing"] == []
        return [kernel["kernel"] for kernel in compiled["kernels"]]

    assert found(["linear", "norm"], torch.bfloat16) == [
        "linear_kernel<bf16>",
        "rms_norm_kernel<bf16>",
    ]
    assert found(["mlp"], torch.float16) == ["gemm_kernel<fp16>"]
    assert found(["start"], torch.float16) == []
    assert len(found()) == 9


def test_a_build_without_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels.fastshard, "__file__", str(tmp_path / "__init__.py"))
    compiled = kernels.describe(["norm"], torch.float16)
    reason = "machine code: this build is pure Python, it has no compiled kernels"
    assert compiled == {"kernels": [], "missing": [reason]}
    assert kernels.lines(compiled) == [f"missing: {reason}"]
    assert kernels.describe(["start"]) == {"kernels": [], "missing": []}  # needs none
    assert cli.main(["info", "--kernels"]) == 1
    assert capsys.readouterr().err == f"fastshard: error: {reason}\n"


def test_a_tool_that_fails_is_listed(monkeypatch):
    def fail(*arguments, **keywords):
        raise subprocess.CalledProcessError(255, ["cuobjdump"])

    monkeypatch.setattr(kernels, "library", lambda: Path("library"))
    monkeypatch.setattr(machine_code, "cuobjdump", fail)
    (reason,) = kernels.describe()["missing"]
    assert reason.startswith("machine code: Command '['cuobjdump']' returned non-zero exit status")


def test_the_command_lists_kernels(monkeypatch, capsys):
    compiled = {"kernels": [GEMM.to_dict()], "missing": []}
    monkeypatch.setattr(kernels, "describe", lambda: compiled)
    assert cli.main(["info", "--kernels"]) == 0
    assert capsys.readouterr().out.splitlines() == kernels.lines(compiled)
    assert cli.main(["info", "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compiled


@pytest.mark.cuda
def test_launches_ask_for_what_the_code_says(tmp_path):
    """The threads and the shared memory of the listing, beside those of launches as profiled."""
    if not torch.cuda.is_available():
        skip_or_fail("FASTSHARD_REQUIRE_GPU", "there is no CUDA device")
    compiled = kernels.describe(["attention", "norm", "mlp"], torch.float16)
    if compiled["missing"]:
        pytest.skip(compiled["missing"][0])
    x = torch.randn(300, 256, device="cuda", dtype=torch.float16)
    q = x.view(1, 300, 4, 64)
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        ops.rms_norm(x, x[0])
        ops.attention(q[:, :100], q, q, causal=True)
        ops.fused_mlp(x[:2], x[:256], x[:256, :128])
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    launches = {
        Kernel(event["name"], "").short_name: event["args"]
        for event in events
        if event.get("cat") == "kernel" and "fastshard::" in event["name"]
    }
    assert len(launches) >= 3
    listed = {kernel["kernel"]: kernel for kernel in compiled["kernels"]}
    for name, launch in launches.items():
        assert listed[name]["threads"] == launch["block"][0], name
        assert listed[name]["shared_bytes"] == launch["shared memory"], name
