"""setup.py's own decisions: whether to build CUDA, and for which architectures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import skip_or_fail

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


# The same, of the compiled library: its version's local part, and how nvcc is called.
EXTENSION_CODE = """
import json, runpy, setuptools
arguments = {}
setuptools.setup = lambda **given: arguments.update(given)
runpy.run_path("setup.py")
nvcc = arguments["ext_modules"][0].extra_compile_args["nvcc"]
from torch.utils import cpp_extension
print(json.dumps({
    "local": arguments["options"]["egg_info"]["tag_build"],
    "nvcc": nvcc,
    "torch_adds": cpp_extension._get_cuda_arch_flags(nvcc),
}))
"""


@pytest.fixture
def checkout(tmp_path):
    """Of a setup.py and no sources, in a folder whose name torch would take for a flag."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("setup.py", "fastshard/tune/nvcc.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_extension(checkout, cuda_version, archs) -> dict:
    """What setup.py asks for with a toolkit that claims to be of this version."""
    if shutil.which("g++") is None:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", "there is no g++ to link the stub of torch with")
    toolkit = checkout / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {cuda_version}, V1'\n")
    nvcc.chmod(0o755)
    environment = os.environ | {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": archs}
    environment |= {"FASTSHARD_BUILD_CUDA": "1"}
    command = [sys.executable, "-c", EXTENSION_CODE]
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_architecture_is_compiled_for(checkout):
    asked = run_extension(checkout, "13.0", "8.0;8.6;9.0+PTX")
    assert [flag for flag in asked["nvcc"] if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert asked["torch_adds"] == []
    assert "-DFASTSHARD_CUDA_ARCHS=8.0 8.6 9.0+PTX" in asked["nvcc"]


@pytest.mark.parametrize(
    ("cuda_version", "local", "compresses"),
    [("12.4", "+cu12", False), ("12.8", "+cu12", True), ("13.0", "", True)],
)
def test_cuda_versions(checkout, cuda_version, local, compresses):
    asked = run_extension(checkout, cuda_version, "")
    assert asked["local"] == local
    assert ("--compress-mode=size" in asked["nvcc"]) == compresses
