"""setup.py's own decisions: whether to build CUDA, and for which architectures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools")

# Runs setup.py with a setup() that builds nothing, and says what it was asked for.
CODE = """
import runpy, setuptools
setuptools.setup = lambda **arguments: print("extensions:", len(arguments.get("ext_modules", [])))
print("architectures:", runpy.run_path("setup.py")["cuda_archs"]())
"""


def run_setup(**variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CODE]
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ""} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_build_that_must_have_cuda_fails_without_a_toolkit(tmp_path):
    run = run_setup(FASTSHARD_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0
    assert f"needs a CUDA toolkit with nvcc, found none (CUDA_HOME={tmp_path})" in run.stderr


@pytest.mark.parametrize("choice", ["auto", "0"])
def test_a_build_that_need_not_is_pure_python(tmp_path, choice):
    run = run_setup(FASTSHARD_BUILD_CUDA=choice, CUDA_HOME=str(tmp_path))
    assert "extensions: 0" in run.stdout, run.stderr


def test_an_unknown_choice_is_named():
    run = run_setup(FASTSHARD_BUILD_CUDA="yes")
    assert run.returncode != 0
    assert "FASTSHARD_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in run.stderr


@pytest.mark.parametrize(
    ("asked", "archs"),
    [("", "8.6+PTX"), ("8.0 8.6+PTX", "8.0;8.6+PTX"), (" 9.0a;8.6 ", "9.0a;8.6")],
)
def test_architectures(asked, archs):
    run = run_setup(TORCH_CUDA_ARCH_LIST=asked, FASTSHARD_BUILD_CUDA="0")
    assert f"architectures: {archs}\n" in run.stdout, run.stderr
