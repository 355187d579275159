"""The command, on a CPU by playing a study back: tables, errors, interruptions."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastshard import arguments, cli
from fastshard.ops import variants
from fastshard.ops.promoted import Promoted, manifest_text
from fastshard.ops.variants import Entry, Table, read_table, write_table
from fastshard.tune import command, recorded, search
from fastshard.tune.problem import Measurement, Problem
from fastshard.tune.recorded import Study
from fastshard.tune.space import OPEN

STUDY = Path(__file__).parent / "data" / "h200.json"
PROBLEM = Problem("linear", "bfloat16", (4, 4096, 6144))
ENTRY = Entry("linear", "bfloat16", (4, 4096, 6144), "library")


def timed(us, auto_us=10.0):
    return Measurement(us, us, us, auto_us, 1.0, 1e-3, None, 1.0)


@pytest.fixture
def study(tmp_path):
    """Of one problem of llama-3.1-8b, with a variant that wins."""
    made = Study("GPU", version("fastshard"))
    made.keep(PROBLEM, "library", timed(8.0))
    path = tmp_path / "study.json"
    made.write(path)
    return path


def tune(*arguments) -> int:
    return cli.main(["tune", *map(str, arguments)])


def replay(study, output, *arguments) -> int:
    return tune("--replay", "--study", study, "--output", output, *arguments)


def test_the_same_seed_writes_the_same_table(tmp_path, capsys):
    outputs = [tmp_path / name for name in ("a.json", "b.json")]
    for output in outputs:
        assert replay(STUDY, output, "--budget", "60s", "--seed", 7) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    table = read_table(outputs[0])
    assert (table.device, table.origin) == ("NVIDIA H200", "measured")
    out = capsys.readouterr().out
    assert "geometric mean of auto / best: 1.0" in out
    assert f"{len(table.entries)} entries written to {outputs[1]}" in out


def test_a_winner_is_written(study, tmp_path, capsys):
    output = tmp_path / "table.json"
    assert replay(study, output, "--op", "linear") == 0
    assert read_table(output) == Table("GPU", "measured", version("fastshard"), (ENTRY,))
    assert "library" in capsys.readouterr().out


def test_a_winner_that_loses_in_a_fresh_process_is_not_written(study, tmp_path, capsys):
    made = recorded.read(study)
    made.keep(PROBLEM, "library", timed(9.9), is_confirmed=True)
    made.write(study)
    output = tmp_path / "table.json"
    assert replay(study, output, "--op", "linear") == 0
    assert read_table(output).entries == ()
    assert "library was not confirmed: 0.990 of auto's time" in capsys.readouterr().out


def test_old_entries_of_other_problems_stay(study, tmp_path):
    output = tmp_path / "table.json"
    other = Entry("rms_norm", "bfloat16", (1, 128), "32x1")
    replaced = Entry("linear", "bfloat16", (3, 4096, 6144), "stream")
    old = Table("GPU", "measured", version("fastshard"), (other, replaced))
    write_table(output, old)
    assert replay(study, output, "--op", "linear") == 0
    assert read_table(output).entries == (other, ENTRY)


def test_the_users_table_is_the_default(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    assert tune("--replay", "--study", study, "--op", "linear") == 0
    assert os.listdir(variants.user_tables_dir()) == ["gpu.json"]


def test_an_interruption_keeps_what_was_found(study, tmp_path, monkeypatch, capsys):
    real = search.Search.run

    def run(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Search, "run", run)
    output = tmp_path / "table.json"
    assert replay(study, output, "--op", "linear") == 130
    assert read_table(output).entries == (ENTRY,)
    assert "interrupted: what was found so far" in capsys.readouterr().out


class Gpu:
    """A measurer in the place of the GPU's; interrupted in its second generation."""

    device = "GPU"

    def __init__(self, *, seed, **settings):
        self.calls = 0

    def __call__(self, problem, names):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return [timed(8.0) for _ in names]

    def confirm(self, problem, variant):
        return timed(8.1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_a_study_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "GpuMeasurer", Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    study, output = tmp_path / "study.json", tmp_path / "table.json"
    files = ("--study", study, "--output", output, "--op", "linear", "--strategy", "all")
    assert tune(*files) == 130
    kept = recorded.read(study)
    assert len(kept) == 2  # one measured, one confirmed
    assert len(read_table(output).entries) == 1
    monkeypatch.setattr(Gpu, "__call__", lambda self, problem, names: [timed(8.0) for _ in names])
    assert tune(*files) == 0
    assert len(read_table(output).entries) == 12
    with pytest.raises(ValueError, match=r"study.json must be a study of GPU, got one of other"):
        command._study_of(other_study(study), "GPU")


def other_study(path):
    Study("other", version("fastshard")).write(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "gelu"), "op must be one of rms_norm, .*, got 'gelu'"),
        (
            ("--model", "gpt-2"),
            "model must be a folder, .* or one of llama-3.2-1b, .*, got 'gpt-2'",
        ),
        (("--op", "layer_norm"), "llama-3.1-8b has no layer_norm"),
        (("--budget", "1s"), "budget must be at least 5 s, got 1 s"),
        (("--plot", "a.txt"), "plot must be a file that ends in"),
    ],
)
def test_wrong_arguments(arguments, message, study, tmp_path, capsys):
    import re

    assert replay(study, tmp_path / "table.json", *arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("text", ["5", "5x", "-1s", "m", "", "5sm", "inf"])
def test_durations(text, capsys):
    if text == "5":
        assert arguments.seconds("5") == arguments.seconds("5s") == 5
        assert arguments.seconds("1.5m") == 90
        return
    with pytest.raises(SystemExit, match="2"):
        tune(f"--budget={text}")
    assert "must be a time like 90s or 5m" in capsys.readouterr().err


def test_wrong_files(study, tmp_path, capsys):
    table = tmp_path / "table.json"
    assert tune("--replay", "--output", table) == 1
    assert "a study must be given to be played back" in capsys.readouterr().err
    assert replay(tmp_path / "none.json", table) == 1
    assert "none.json" in capsys.readouterr().err
    table.write_text("{")
    assert replay(study, table, "--op", "linear") == 1
    assert "table.json must be JSON" in capsys.readouterr().err
    assert table.read_text() == "{", "another's file is left alone"
    write_table(table, Table("other", "measured", version("fastshard"), ()))
    assert replay(study, table, "--op", "linear") == 1
    assert "must be a measured table of GPU, got a measured one of other" in capsys.readouterr().err


def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune("--study", tmp_path / "s.json", "--output", tmp_path / "t.json") == 1
    assert "--replay --study FILE searches what another run measured" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_on_paper(tmp_path, capsys):
    output = tmp_path / "8.6.json"
    assert tune("--on-paper", "8.6", "--output", output) == 0
    table = read_table(output)
    assert (table.device, table.origin) == ("8.6", "model")
    assert f"{len(table.entries)} entries written" in capsys.readouterr().out
    shipped = Path(command.__file__).parent / "tables" / "8.6.json"
    assert shipped.read_bytes() == output.read_bytes()
    assert tune("--on-paper", "7.0", "--output", output) == 1
    assert "capability must be one of 8.6, 9.0, got '7.0'" in capsys.readouterr().err
    assert tune("--on-paper", "8.6") == 1
    assert "--on-paper needs --output" in capsys.readouterr().err


def test_the_plot_is_written(study, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "gain.png"
    assert replay(study, tmp_path / "table.json", "--op", "linear", "--plot", plot) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_choices_are_those_of_the_search():
    assert cli._STRATEGIES == search.STRATEGIES


def test_a_checkpoint_folder_has_problems(tmp_path):
    from fastshard.loading import demo_model

    found = command._problems(str(demo_model()), ["rms_norm"], "float16")
    assert {problem.op for problem in found} == {"rms_norm"}
    assert sys.modules["fastshard.checkpoint"]


ROOT = Path(__file__).parents[2]
NORM = Problem("rms_norm", "bfloat16", (1, 4096))
OPEN_FILES = ("--op", "rms_norm", "--source", ROOT)


@pytest.fixture
def open_study(tmp_path):
    """Of all variants of one problem; 192x5 is the fastest, and 128x4 of those in the menu."""
    made = Study("GPU", version("fastshard"))
    for number, name in enumerate(OPEN.legal_variants(NORM)):
        made.keep(NORM, name, timed({"192x5": 7.0, "128x4": 8.0}.get(name, 9.0 + number / 100)))
    path = tmp_path / "study.json"
    made.write(path)
    return path


def test_a_winner_outside_the_menu_is_in_the_patch_and_not_in_the_table(
    open_study, tmp_path, capsys
):
    output, patch = tmp_path / "table.json", tmp_path / "new" / "menu.patch"
    files = (*OPEN_FILES, "--strategy", "all")
    assert replay(open_study, output, *files, "--patch", patch) == 0
    entry = Entry("rms_norm", "bfloat16", (1, 4096), "128x4")
    assert read_table(output).entries == (entry,)
    lines = patch.read_text().split("\n")
    assert [line for line in lines if line.startswith("+") and line[1] != "+"] == [
        "+    {192, 5},",
        '+    "192x5",',
    ]
    out = capsys.readouterr().out
    assert "192x5               7.00 us, auto     10.00 us, 1.429x, not in the menu" in out
    assert "1 entries written" in out
    assert f"patch of the menus written to {patch}: git apply it in {ROOT}, build" in out
    # The same without the mode: the table is the same, whatever the study knows.
    assert replay(open_study, tmp_path / "other.json", "--op", "rms_norm") == 0
    assert read_table(tmp_path / "other.json") == read_table(output)


def test_an_addition_must_win_again(open_study, tmp_path, capsys):
    made = recorded.read(open_study)
    made.keep(NORM, "192x5", timed(7.9), is_confirmed=True)  # not 2 % faster than 128x4
    made.write(open_study)
    patch = tmp_path / "menu.patch"
    files = (*OPEN_FILES, "--strategy", "all", "--patch", patch)
    assert replay(open_study, tmp_path / "table.json", *files) == 0
    assert not patch.exists()
    out = capsys.readouterr().out
    assert "192x5 was not confirmed: 0.790 of auto's time" in out
    assert f"no variant to add to the menus: {patch} is not written" in out
    assert len(read_table(tmp_path / "table.json").entries) == 1


def test_the_same_seed_writes_the_same_patch(open_study, tmp_path):
    patches = [tmp_path / name for name in ("a.patch", "b.patch")]
    for patch in patches:
        files = (*OPEN_FILES, "--seed", 3, "--budget", "40s", "--patch", patch)
        assert replay(open_study, tmp_path / "table.json", *files) == 0
    assert patches[0].read_bytes() == patches[1].read_bytes() != b""


def promote(folder, name, op="rms_norm", dtypes=("bfloat16",)) -> None:
    """Write what ``fastshard archive promote`` writes, without the kernel itself."""
    found = Promoted(
        name=name,
        op=op,
        dtypes=dtypes,
        **dict.fromkeys(("fastshard", "torch", "python", "id", "op_name", "kernel_name"), "-"),
        **dict.fromkeys(("source", "revision", "licence", "attribution"), "-"),
        measured=(),
        verified={},
        files={"kernel.so": "-"},
    )
    (folder / "promoted" / name).mkdir(parents=True)
    (folder / "promoted" / name / "kernel.json").write_text(manifest_text(found))


def test_a_promoted_kernel_is_measured_and_written(tmp_path, monkeypatch):
    """On a GPU; played back it is not searched, but an entry of it stays."""
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))
    promote(tmp_path, "promoted_a")
    promote(tmp_path, "promoted_b", dtypes=("float16",))
    promote(tmp_path, "promoted_c", op="layer_norm")
    asked = []

    def measure(self, problem, names):
        asked.extend(names)
        return [timed(5.0 if name == "promoted_a" else 9.9) for name in names]

    monkeypatch.setattr(command, "GpuMeasurer", Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(Gpu, "__call__", measure)
    monkeypatch.setattr(Gpu, "confirm", lambda self, problem, name: timed(5.0))
    study = tmp_path / "study.json"
    assert tune("--op", "rms_norm", "--strategy", "all", "--study", study, "--budget", "60s") == 0
    assert {name for name in asked if "promoted" in name} == {"promoted_a"}
    table = tmp_path / "tables" / "gpu.json"
    assert {entry.variant for entry in read_table(table).entries} == {"promoted_a"}
    before = read_table(table)
    # A study is played back alike on every machine, whatever its user promoted.
    assert replay(study, tmp_path / "other.json", "--op", "rms_norm") == 0
    assert not any(
        "promoted" in each.variant for each in read_table(tmp_path / "other.json").entries
    )
    assert replay(study, table, "--op", "rms_norm") == 0
    assert read_table(table) == before


def test_layer_norms_are_tuned_where_one_was_promoted(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"^llama-3\.1-8b has no layer_norm$"):
        command._problems("llama-3.1-8b", ["layer_norm"], "float16")
    promote(tmp_path, "promoted_c", op="layer_norm")
    found = command._problems("llama-3.1-8b", ["layer_norm"], "float16")
    assert [problem.shape for problem in found] == [
        *((1, 4096), (16, 4096), (512, 4096), (2048, 4096), (8192, 4096))
    ]
    assert all(problem.op == "layer_norm" for problem in found)
    every = command._problems("llama-3.1-8b", None, "float16")
    assert not any(problem.op == "layer_norm" for problem in every)


def test_what_does_not_compile_is_in_the_study_with_its_reason(
    toolkit, tmp_path, monkeypatch, capsys
):
    """The whole mode, but for the GPU and the compiler."""
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "GpuMeasurer", Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    known = {"192x5": 7.0, "128x4": 8.0, "224x3": 1.0, "192x4": 2.0}
    measured = []

    def measure(self, problem, names):
        measured.extend(names)
        return [timed(known.get(name, 9.0)) for name in names]

    monkeypatch.setattr(Gpu, "__call__", measure)
    monkeypatch.setattr(Gpu, "confirm", lambda self, problem, name: timed(known[name]))
    monkeypatch.setattr(command, "_problems", lambda *args: [NORM])
    study, patch = tmp_path / "study.json", tmp_path / "menu.patch"
    files = ("--study", study, "--output", tmp_path / "table.json", "--patch", patch)
    assert tune(*files, "--source", ROOT, "--strategy", "all") == 0
    kept = recorded.read(study)
    assert kept.get(NORM, "192x4").reason == "spills 624 bytes of registers"
    assert kept.get(NORM, "224x3").reason.startswith("does not compile: csrc/norm/row.cuh(7)")
    assert set(measured) == set(OPEN.legal_variants(NORM)) - {"192x4", "224x3"}
    assert "+    {192, 5}," in patch.read_text()
    assert patch.read_text().count("\n+    ") == 2


def test_no_nvcc(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tune("--patch", tmp_path / "menu.patch", "--source", ROOT) == 1
    error = capsys.readouterr().err
    assert (
        "a patch of the menu needs nvcc, to compile what is not in it, and there is none" in error
    )
    assert "set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cudart,cccl,crt]'" in error
    assert os.listdir(tmp_path) == []


def test_sources(open_study, tmp_path, monkeypatch, capsys):
    table, patch = tmp_path / "table.json", tmp_path / "menu.patch"
    assert replay(open_study, table, "--source", ROOT) == 1
    assert "a source is of use only for a patch of the menu" in capsys.readouterr().err
    files = ("--op", "rms_norm", "--patch", patch)
    monkeypatch.chdir(tmp_path)
    assert replay(open_study, table, *files) == 1
    message = f"source must be a checkout of fastshard, which has csrc, got {tmp_path}: git clone"
    assert message in capsys.readouterr().err
    assert not table.exists()
    monkeypatch.chdir(ROOT)
    assert replay(open_study, table, *files, "--strategy", "all") == 0
    assert patch.exists()
