"""``fastshard profile``: its report on runs of the embedded model, and what it refuses."""

import json
import re
import shlex
import sys

import pytest

import fastshard
from fastshard import cli
from fastshard.profile import command, recorded, table
from helpers import CUDA_ONLY

GENERATE = ["generate", "def ", "--max-new-tokens", "2"]
ROW = re.compile(r" +(\d+) +(\d+\.\d{3}) +(\d+\.\d\d) +(\d+\.\d)%(?: +(?:(\d+\.\d)%|-))?  (\S.*)")


@pytest.fixture
def profile(capfd):
    """Run ``fastshard profile`` in this process: (status, stdout, stderr)."""

    def profile(*arguments):
        capfd.readouterr()
        try:
            status = cli.main(["profile", *arguments])
        except SystemExit as stop:
            status = stop.code
        return (status, *capfd.readouterr())

    return profile


def rows(err):
    """Name -> (calls, total ms, mean us, share, % limit) of every row, in their order."""
    found = [match.groups() for match in map(ROW.fullmatch, err.splitlines()) if match]
    assert found, err
    return {name: tuple(float(x) if x else None for x in figures) for *figures, name in found}


def report(err):
    """The lines without those of the profiler's own library."""
    return [line for line in err.splitlines() if not line.startswith(("USDT:", "INFO:"))]


def test_report_of_a_run_on_the_cpu(profile, capfd):
    words = [*GENERATE, "--device", "cpu", "--decode", "eager"]
    status, out, err = profile("--", *words)
    assert status == 0
    assert cli.main(words) == 0
    assert out == capfd.readouterr().out
    figures = rows(err)
    num_layers, passes = 5, 2
    for name, calls in {
        "fastshard::linear": (2 * num_layers + 1) * passes,
        "fastshard::attention": num_layers * passes,
        "fastshard::fused_mlp": num_layers * passes,
        "fastshard::sample": passes,
    }.items():
        assert figures[name][0] == calls, name
    assert "aten::matmul" not in figures  # they are within ours
    for calls, total, mean, _, limit in figures.values():
        assert total * 1e3 / calls == pytest.approx(mean, abs=0.006 + 0.5 / calls)
        assert limit is None
    assert sum(share for _, _, _, share, _ in figures.values()) == pytest.approx(100, abs=2.5)
    totals = [total for _, total, *_ in figures.values()]
    assert totals == sorted(totals, reverse=True)
    lines = report(err)
    assert lines[0].startswith("2 prompt tokens in ")  # the command's own
    assert " ".join(lines[1].split()) == "calls total ms mean us share op (time on the CPU)"
    assert lines[-3] == "for a closer look:"


def test_sort_by_name(profile):
    names = list(rows(profile("--sort", "name", "--", *GENERATE, "--device", "cpu")[2]))
    assert names == sorted(names)


def test_trace_holds_ranges_of_layers_and_ops(profile, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an old one")
    words = [*GENERATE, "--device", "cpu", "--decode", "eager"]
    status, _, err = profile("--trace", str(path), "--", *words)
    assert status == 0
    assert f"trace: {path} " in err
    events = json.loads(path.read_text())["traceEvents"]
    spans = {}
    for event in events:
        if event.get("ph") == "X":
            begin = event["ts"]
            spans.setdefault(event["name"], []).append((begin, begin + event["dur"]))
    for i in range(5):
        assert len(spans[f"layers.{i}"]) == 2
    (begin, end), *_ = spans["layers.3"]
    within = [name for name, all_ in spans.items() if any(begin <= b < e <= end for b, e in all_)]
    assert {"layers.3.attn", "layers.3.mlp", "fastshard::attention"} <= set(within)
    assert "layers.2.attn" not in within


def test_persistent_decoding_is_one_op_a_step(profile):
    words = ["generate", "def ", "--max-new-tokens", "4", "--device", "cpu"]
    assert (
        rows(profile("--", *words, "--decode", "persistent")[2])["fastshard::decode_step"][0] == 3
    )


def test_another_command(profile):
    status, out, err = profile("--", "info", "--json")
    assert status == 0
    assert json.loads(out)["fastshard"] == fastshard.__version__
    assert "  op (time on the CPU)" in err


def test_command_lines_of_deeper_tools(profile):
    words = ["generate", "it's; $HOME", "--max-new-tokens", "1", "--device", "cpu"]
    nsys, ncu = profile("--", *words)[2].splitlines()[-2:]
    own = [sys.executable, "-m", "fastshard", *words]
    assert shlex.split(nsys)[:4] == ["FASTSHARD_NVTX=1", "nsys", "profile", "--stats=true"]
    assert shlex.split(ncu)[:3] == ["ncu", "--set", "full"]
    for line in (nsys, ncu):
        assert shlex.split(line)[-len(own) :] == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "profile: error: -- and another command of fastshard must follow, got nothing"),
        (["--"], "profile: error: -- and another command of fastshard must follow, got nothing"),
        (["--", "profile", "--", "info"], "another command of fastshard must follow, got profile"),
        (["--", "generat", "a"], "error: argument COMMAND: invalid choice: 'generat'"),
        (
            ["--", "generate"],
            "generate: error: one of the arguments PROMPT --prompts-file is required",
        ),
        (["--sort", "calls", "--", "info"], "profile: error: argument --sort: invalid choice"),
        (["generate", "a"], "error: unrecognized arguments: generate a"),
    ],
)
def test_wrong_command_lines_are_status_2_and_one_line(profile, arguments, message):
    status, out, err = profile(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("name", "reason"), [("none/t.json", "No such file or directory"), (".", "Is a directory")]
)
def test_a_trace_that_cannot_be_written_is_refused_before_the_run(profile, tmp_path, name, reason):
    path = tmp_path / name
    status, out, err = profile("--trace", str(path), "--", *GENERATE)
    assert (status, out) == (1, "")
    rule = f"--trace must be a file that can be written, got {path} ({reason})"
    assert err == f"fastshard: error: {rule}\n"


def test_a_run_that_fails_is_one_line_and_leaves_no_trace(profile, tmp_path):
    path = tmp_path / "t.json"
    status, out, err = profile("--trace", str(path), "--", "generate", "", "--device", "cpu")
    assert (status, out) == (1, "")
    error = "fastshard: error: prompt must have at least one token, got none"
    assert report(err) == [error]
    assert not path.exists()


def test_an_old_trace_is_kept_until_there_is_a_new_one(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("old")
    command.check_writable(path)
    assert path.read_text() == "old"


def test_choices_are_those_of_the_table():
    assert cli._SORTS == table.SORTS


@CUDA_ONLY
@pytest.mark.parametrize(("mode", "kernel"), [("persistent", "decode"), ("eager", "linear")])
def test_kernels_of_ours_on_a_gpu(profile, device, tmp_path, mode, kernel):
    path = tmp_path / "t.json"
    words = ["generate", "def ", "--max-new-tokens", "40", "--decode", mode]
    status, _, err = profile("--trace", str(path), "--", *words)
    assert status == 0
    kernels, ours = err.split("op of fastshard (time of its kernels)")
    names = [name for name in rows(kernels) if name.startswith("fastshard::")]
    assert any(kernel in name for name in names), names
    assert not any(name.startswith("layers.") for name in rows(err))
    name = "fastshard::decode_step" if mode == "persistent" else "fastshard::fused_mlp"
    calls, _, _, share, limit = rows(ours)[name]
    assert calls == (39 if mode == "persistent" else 40 * 5)  # replays of a graph included
    assert 0 < share <= 100
    if recorded.RECORDS_DTYPES:
        assert limit > 0
    else:
        assert limit is None
        assert "% limit: torch" in err
    assert '"layers.3"' in path.read_text()
