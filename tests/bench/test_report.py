"""Lines, derived figures and the JSON."""

import dataclasses
import json
import math

import pytest

from fastshard.bench import report
from fastshard.bench.report import Line, Skipped
from fastshard.bench.timing import Timing

LINE = Line(
    case="mlp",
    variant="fastshard",
    is_peer=False,
    shape="1 x 4096, intermediate 14336",
    dtype="bfloat16",
    timing=Timing(us=80.0, p20=79.5, p80=81.25, n=50),
    num_bytes=352_321_536,
    flops=352_321_536,
    limit_us=76.0,
    best_peer_us=96.0,
    error=0.00312,
    eager_error=0.00301,
    first_call_seconds=0.25,
)
SKIPPED = Skipped("mlp", "torch compile", "1 x 4096, intermediate 14336", "no triton")


def test_memory_and_its_goal():
    measured = dataclasses.replace(LINE, peak_bytes=93_250_000)
    assert measured.text().endswith("  peak 93.2 MB")
    measured = dataclasses.replace(measured, memory_goal=92_300_000)
    assert measured.text().endswith("  peak 93.2 MB (goal 92.3)")
    assert dataclasses.replace(LINE, memory_goal=92_300_000).text() == LINE.text()


def test_derived_figures():
    assert LINE.gbps == pytest.approx(4404.02, abs=0.01)
    assert LINE.tflops == pytest.approx(4.40402, abs=1e-5)
    assert LINE.percent_of_limit == pytest.approx(95.0)
    assert LINE.times_best_peer == pytest.approx(1.2)
    assert dataclasses.replace(LINE, best_peer_us=None).times_best_peer is None


def test_line_has_every_figure():
    words = LINE.text().split()
    assert words[:2] == ["mlp", "fastshard"]
    assert words[2:7] == ["1", "x", "4096,", "intermediate", "14336"]
    assert words[7:] == [
        *("bfloat16", "80.00", "us", "79.50-81.25", "50", "4404", "4.40", "95.0%", "1.20"),
        *("3.1e-03", "(3.0e-03)"),
    ]


def test_milliseconds_and_compile_time():
    timing = Timing(us=12_345.6, p20=12_000.0, p80=13_000.0, n=5)
    text = dataclasses.replace(LINE, timing=timing, first_call_seconds=41.26).text()
    assert " 12.346 ms " in text
    assert " 12.000-13.000 " in text
    assert text.endswith("  first call 41.3 s")


def test_lines_are_aligned():
    alone = dataclasses.replace(LINE, best_peer_us=None, eager_error=None, error=math.nan)
    slow = dataclasses.replace(LINE, timing=Timing(us=99_999.9, p20=9e4, p80=1e5, n=999))
    lines = [LINE.text(), alone.text(), slow.text()]
    assert {len(line) for line in lines} == {len(report.HEADER)}
    for name in ("case", "variant", "shape", "dtype"):  # left-aligned columns
        start = report.HEADER.index(name)
        assert all(
            line[:start].endswith(" " * (start > 0)) and line[start] != " " for line in lines
        ), name
    for name in ("time", "n", "GB/s", "TFLOP/s", "% limit", "x peer", "error", "(eager)"):
        end = report.HEADER.index(f" {name}") + len(name) + 1
        assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for line in lines)
    assert SKIPPED.text().index("none: no triton") == report.HEADER.index("dtype")


def test_json_holds_everything(tmp_path):
    path = tmp_path / "results" / "run.json"
    nan = dataclasses.replace(LINE, error=math.nan)
    report.write_json(
        path,
        command=["fastshard", "bench", "mlp"],
        environment={"device": "NVIDIA H200"},
        limits={"copy_gbps": 4250.0},
        compiled={"kernels": [], "missing": ["machine code: no cuobjdump"]},
        results=[LINE, SKIPPED, nan],
        processes={"start": [{"seconds": 3.5}], "load": []},
    )
    content = json.loads(path.read_text())
    assert content["command"] == ["fastshard", "bench", "mlp"]
    assert content["environment"] == {"device": "NVIDIA H200"}
    assert content["limits"] == {"copy_gbps": 4250.0}
    assert content["machine_code"] == {"kernels": [], "missing": ["machine code: no cuobjdump"]}
    assert (content["start"], content["load"]) == ([{"seconds": 3.5}], [])
    assert content["skipped"] == [dataclasses.asdict(SKIPPED)]
    first, second = content["lines"]
    assert first["timing"] == {"us": 80.0, "p20": 79.5, "p80": 81.25, "n": 50}
    assert first["times_best_peer"] == pytest.approx(1.2)
    assert (first["error"], second["error"]) == (0.00312, None)
    assert {field.name for field in dataclasses.fields(Line)} <= set(first)
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_introduction_says_what_ran_and_what_is_missing():
    environment = {
        "device": "NVIDIA H200",
        "multiprocessors": 132,
        "clocks.sm": "1980 MHz",
        "driver_version": "580.1",
        "fastshard": "0.1.0",
        "code": "compute_86 (PTX)",
        "torch": "2.11.0",
        "cudnn": 91002,
        "triton": None,
    }
    limits = {
        "copy_gbps": 4251.4,
        "graph_node_us": 1.16,
        "matmul_tflops": 780.2,
        "mma_tflops": None,
        "missing": ["the Triton read kernel: No module named 'triton'"],
    }
    lines = report.introduction(environment, limits)
    assert lines[0] == "NVIDIA H200, 132 multiprocessors, 1980 MHz, driver 580.1"
    assert lines[1].startswith("fastshard 0.1.0 (compute_86 (PTX)), torch 2.11.0, cuDNN 91002")
    assert lines[1].endswith("triton missing")
    assert "copy 4251 GB/s, graph node 1.16 us, matmul 780 TFLOP/s, mma.sync unknown" in lines[2]
    (line,) = report.introduction(environment, limits | {"mma_tflops": 620.6, "missing": []})[2:]
    assert "matmul 780 TFLOP/s, mma.sync 621 TFLOP/s; reads" in line
    assert lines[3] == "missing: the Triton read kernel: No module named 'triton'"


def test_a_line_for_each_traffic_limit():
    reads = [{"num_bytes": 33_554_432, "us": 9.41, "gbps": 3565.8, "by": "triton 2048x1, 4 warps"}]
    copies = [{"num_bytes": 268_000_000, "us": 64.0, "gbps": 4187.5, "by": "torch copy"}]
    lines = report.traffic_limits({"read": reads, "copy": copies})
    assert [" ".join(line.split()) for line in lines] == [
        "read triton 2048x1, 4 warps 33.6 MB 9.41 us 3566 GB/s",
        "copy torch copy 268.0 MB 64.00 us 4188 GB/s",
    ]
