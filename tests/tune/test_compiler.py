"""Compiling outside the menus without an nvcc: a script in its place; checkouts; what is kept."""

import os
import subprocess
import threading
from importlib import metadata
from importlib.metadata import version
from pathlib import Path

import pytest

from fastshard.tune import nvcc
from fastshard.tune.compiler import Compiler, CompilingMeasurer, checkout, why_unusable
from fastshard.tune.problem import Measurement, Problem

ROOT = Path(__file__).parents[2]
NORM = Problem("rms_norm", "bfloat16", (1, 4096))
LOCAL = "ptxas warning : Local memory used for function 'f', size of stack frame: 248 bytes\n"
SPILL = (
    "ptxas warning : Registers are spilled to local memory in function 'f', "
    "624 bytes spill stores, 380 bytes spill loads\n"
)


def calls(toolkit) -> list[str]:
    path = toolkit / "bin" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_what_compiles_is_kept(toolkit, tmp_path):
    made = Compiler(ROOT, tmp_path / "cache")
    assert made.build(NORM, ["192x3", "256x2", "384x2"]) == {}
    assert len(calls(toolkit)) == 2, "one of the three is in the menu"
    library = made.library(NORM, "192x3")
    assert "RowVariant{192, 3}" in library.read_text()
    assert made.library(NORM, "384x2") != library
    assert made.library(Problem("rms_norm", "float16", (1, 4096)), "192x3") != library
    assert made.library(Problem("add_rms_norm", "bfloat16", (9, 64)), "192x3") == library
    assert Compiler(ROOT, tmp_path / "cache").build(NORM, ["192x3", "384x2"]) == {}
    assert len(calls(toolkit)) == 2, "kept"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    call = calls(toolkit)[0]
    assert f"-I{ROOT}/csrc " in call
    assert " -gencode=arch=compute_86,code=[sm_86,compute_86] " in call


def test_other_sources_are_compiled_anew(toolkit, tmp_path):
    copy = tmp_path / "copy"
    (copy / "csrc").mkdir(parents=True)
    (copy / "csrc" / "a.cuh").write_text("1")
    first = Compiler(copy, tmp_path).library(NORM, "192x3")
    assert Compiler(copy, tmp_path).library(NORM, "192x3") == first
    (copy / "csrc" / "a.cuh").write_text("2")
    assert Compiler(copy, tmp_path).library(NORM, "192x3") != first


def test_what_does_not_has_a_reason_and_is_not_kept(toolkit, tmp_path, monkeypatch):
    real = subprocess.run

    def run(command, timeout, **settings):
        if "{320, 5}" in Path(command[-3]).read_text():
            raise subprocess.TimeoutExpired(command, timeout)
        return real(command, timeout=timeout, **settings)

    made = Compiler(ROOT, tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", run)
    found = made.build(NORM, ["192x4", "224x3", "320x5", "192x3"])
    assert found.keys() == {"192x4", "224x3", "320x5"}
    assert found["192x4"] == "spills 624 bytes of registers"
    why = "does not compile: csrc/norm/row.cuh(7): error: static assertion failed"
    assert found["224x3"] == why
    assert found["320x5"] == "nvcc took more than 600 s"
    assert list((tmp_path / "cache").iterdir()) == [made.library(NORM, "192x3")]


def test_so_many_at_a_time_as_are_allowed(toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    made = Compiler(ROOT, tmp_path / "cache")
    two, lock, running, most = threading.Barrier(2), threading.Lock(), [], []

    def run(command, **settings):
        with lock:
            running.append(command)
            most.append(len(running))
        two.wait(timeout=60)  # for another one beside it
        with lock:
            running.remove(command)
        return subprocess.CompletedProcess(command, 1, "no", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert len(made.build(NORM, ["192x3", "192x5", "192x6", "192x7"])) == 4
    assert max(most) == 2


@pytest.mark.parametrize(
    ("status", "output", "why"),
    [
        (0, "", None),
        (0, "warning #177-D: variable was declared but never referenced", None),
        (0, LOCAL + SPILL, "spills 624 bytes of registers"),
        (0, LOCAL, "needs 248 bytes of local memory"),
        (1, "nvcc fatal   : Unsupported gpu architecture", "does not compile: nvcc fatal   : Unsu"),
        (137, "", "does not compile: status 137"),
    ],
)
def test_reasons(status, output, why):
    found = why_unusable(status, output)
    assert found is None if why is None else found.startswith(why)


def test_no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    message = (
        rf"needs nvcc, .* there is none \(CUDA_HOME={tmp_path}\): set CUDA_HOME, or pip install"
    )
    with pytest.raises(RuntimeError, match=message):
        Compiler(ROOT, tmp_path)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(nvcc, "find_cuda_home", lambda: None)
    with pytest.raises(RuntimeError, match=r"there is none \(CUDA_HOME=None\)"):
        Compiler(ROOT, tmp_path)


def test_an_nvcc_that_does_not_run(toolkit, tmp_path):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"bin/nvcc does not run: .*exit status 3"):
        Compiler(ROOT, tmp_path)


def test_checkouts(tmp_path, monkeypatch):
    assert checkout(ROOT) == ROOT
    with monkeypatch.context() as patch:  # of a wheel for CUDA 12
        local = f"{version('fastshard')}+cu12"
        patch.setattr(metadata, "version", lambda name: local)
        assert checkout(ROOT) == ROOT
    with pytest.raises(ValueError, match=r"source must be a checkout of fastshard, .*, got .*tune"):
        checkout(ROOT / "fastshard" / "tune")
    (tmp_path / "csrc").mkdir()
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace('"fastshard"', '"other"', 1))
    with pytest.raises(ValueError, match="source must be a checkout of fastshard, which has csrc"):
        checkout(tmp_path)
    old = project.replace(f'version = "{version("fastshard")}"', 'version = "0.0.1"')
    (tmp_path / "pyproject.toml").write_text(old)
    message = rf"of fastshard {version('fastshard')}, which is installed, got one of 0.0.1 in "
    with pytest.raises(ValueError, match=message):
        checkout(tmp_path)


class Measurer:
    device = "GPU"

    def __init__(self):
        self.asked = []

    def __call__(self, problem, variants):
        self.asked.append(list(variants))
        return [Measurement(8.0, 8.0, 8.0, 10.0, 1.0, 1e-3, None, 1.0) for _ in variants]

    def confirm(self, problem, variant):
        self.asked.append(variant)
        return Measurement(8.1, 8.1, 8.1, 10.0, 1.0, 1e-3, None, 1.0)


def test_only_what_compiles_is_measured(toolkit, tmp_path):
    measurer = Measurer()
    both = CompilingMeasurer(measurer, Compiler(ROOT, tmp_path / "cache"))
    assert both.device == "GPU"
    good, bad, of_menu = both(NORM, ["192x3", "224x3", "256x2"])
    assert measurer.asked == [["192x3", "256x2"]]
    assert (good.us, of_menu.us, bad.us) == (8.0, 8.0, None)
    assert bad.reason.startswith("does not compile: ")
    assert good.seconds > 1.0, "compiling counts"
    assert both(NORM, ["224x3"])[0].us is None
    assert len(measurer.asked) == 1, "nothing to measure"
    assert both.confirm(NORM, "224x3").us is None
    (tmp_path / "cache").rename(tmp_path / "lost")
    assert both.confirm(NORM, "192x3").us == 8.1
    assert os.listdir(tmp_path / "cache") == os.listdir(tmp_path / "lost")
    assert measurer.asked[1:] == ["192x3"]


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("8.6", ["-gencode=arch=compute_86,code=[sm_86]"]),
        (
            "8.0;9.0a+PTX",
            [
                "-gencode=arch=compute_80,code=[sm_80]",
                "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
            ],
        ),
    ],
)
def test_architectures(archs, flags):
    assert nvcc.arch_flags(archs) == nvcc.arch_flags(archs.replace(";", ",")) == flags
