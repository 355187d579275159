"""Compiling in a sandbox: what is kept, what is said, what is not run."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archive.corpus import DIES_WHEN_LOADED
from fastshard.archive import compile, sandbox
from helpers import skip_or_fail

PARTS = sandbox.allowed_parts()


@pytest.fixture
def compiler():
    try:
        compile.check_compilers(cuda=False)
    except RuntimeError as error:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", str(error))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))
    return tmp_path / "archive" / "builds"


def refuse_to_run(*arguments, **named):
    raise AssertionError("something was run")


def test_a_build_is_kept_and_not_loaded(compiler, cache, monkeypatch):
    # Loading it would kill the process that compiles it.
    built = compile.build(DIES_WHEN_LOADED, parts=PARTS)
    assert built.reason is None
    assert built.library.read_bytes()[:4] == b"\x7fELF"
    assert built.folder == built.library.parent
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [built.library.name]
    monkeypatch.setattr(sandbox.Sandbox, "start", refuse_to_run)
    assert compile.build(DIES_WHEN_LOADED, parts=PARTS) == built
    with pytest.raises(AssertionError, match="something was run"):
        compile.build(DIES_WHEN_LOADED + " ", parts=PARTS)


def test_the_reason_is_kept(compiler, monkeypatch):
    code = '\n#error "not today"\n'
    built = compile.build(code, parts=PARTS)
    assert built.library is None
    assert built.reason == 'archive_kernel.cpp:2:2: error: #error "not today"'
    monkeypatch.setattr(sandbox.Sandbox, "start", refuse_to_run)
    assert compile.build(code, parts=PARTS) == built


def test_a_compiler_that_is_late_is_killed_and_no_reason_kept(compiler, cache):
    built = compile.build("int x;", parts=PARTS, timeout=0.05)
    assert (built.library, built.reason) == (None, "the compiler took more than 0.05 s")
    assert list(cache.rglob("*")) == []


def test_a_compiler_that_takes_too_much_is_killed(compiler, cache, monkeypatch):
    monkeypatch.setattr(compile, "LIMITS", sandbox.Limits(resident_bytes=2**26))
    built = compile.build("int x;", parts=PARTS)
    assert built.reason == "the compiler took more than 0.0625 GiB of resident memory"
    assert list(cache.rglob("*")) == []


def test_a_compiler_is_limited_in_addresses():
    assert compile.LIMITS.address_space_bytes is not None
    assert compile.LIMITS.as_resources()["RLIMIT_AS"] == 32 * 2**30


@pytest.mark.parametrize(
    ("code", "cuda"),
    [
        ("#include <torch/extension.h>\nint f() { return 1 << 2; }", False),
        ("__global__ void f() {}", True),
        ("f<<<1, 2>>>();", True),
        ("#include <cuda_runtime.h>", True),
        ("#include <cuda.h>", True),
        ("#include <ATen/cuda/CUDAContext.h>", True),
        ("// no barracuda.h", False),
    ],
)
def test_which_code_needs_nvcc(code, cuda):
    assert compile.is_cuda(code) is cuda


def test_what_is_missing_is_named(compiler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        said = r"^compiling needs a C\+\+ compiler, and there is no no-such-compiler: set CXX$"
        with pytest.raises(RuntimeError, match=said):
            compile.build("int x;", parts=PARTS)
    with monkeypatch.context() as patch:
        patch.setattr(compile.shutil, "which", lambda name, path=None: None if path else "/bin/x")
        said = r"^compiling by torch.utils.cpp_extension needs ninja: pip install ninja$"
        with pytest.raises(RuntimeError, match=said):
            compile.build("int x;", parts=PARTS)
    with monkeypatch.context() as patch:
        patch.setattr(compile.sysconfig, "get_path", lambda name: "/absent")
        said = r"^compiling needs Python's headers, and there are none in /absent: install python3-"
        with pytest.raises(RuntimeError, match=said):
            compile.build("int x;", parts=PARTS)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_HOME", "/absent")
        with pytest.raises(RuntimeError, match=r"^CUDA code needs nvcc, .*\(CUDA_HOME=/absent\)"):
            compile.check_compilers(cuda=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is for CUDA")
def test_cuda_needs_a_torch_for_cuda(monkeypatch):
    monkeypatch.setattr(compile, "check_compilers", lambda cuda: "nvcc")
    with pytest.raises(RuntimeError, match=r"^CUDA code needs a torch for CUDA, got torch 2\."):
        compile.build("__global__ void f() {}", parts=PARTS)


def test_where_the_runtime_of_cuda_is(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "folder"
    (home / "lib").mkdir(parents=True)
    folder.mkdir()
    assert compile._cuda_libraries(home, folder) == []
    (home / "lib" / "libcudart.so.13").write_text("13")
    assert compile._cuda_libraries(home, folder) == [f"-L{folder}"]
    assert (folder / "libcudart.so").read_text() == "13"
    (home / "lib" / "libcudart.so").write_text("any")
    assert compile._cuda_libraries(home, folder) == [f"-L{home / 'lib'}"]


WRITES_A_NUMBER = """
#include <sstream>
extern "C" long digits(long n) { std::ostringstream out; out << n; return out.str().size(); }
"""


def test_a_static_cpp_library_is_left_out(compiler, tmp_path):
    """Its streams would not know those of PyTorch's, and crash."""
    if shutil.which("nm") is None:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", "there is no nm")
    cxx = os.environ.get("CXX", "c++")
    for name, command in (("cxx", cxx), ("static", f"{cxx} -static-libstdc++")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tmp_path / name).chmod(0o755)
    source, defined = tmp_path / f"{compile.NAME}.cpp", {}
    source.write_text(WRITES_A_NUMBER)
    for name in ("cxx", "static"):
        folder = tmp_path / f"by_{name}"
        folder.mkdir()
        environment = os.environ | {"CXX": str(tmp_path / name), "PATH": compile._path()}
        safely = ["-P"] if sys.version_info >= (3, 11) else []
        command = [sys.executable, *safely, "-m", compile.__name__, source, folder, "-O0"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        library = folder / f"{compile.NAME}.so"
        listed = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
        defined[name] = {line.split()[-1] for line in listed.splitlines()}
        assert ctypes.CDLL(library).digits(12345) == 5
    assert "digits" in defined["static"]
    assert defined["static"] == defined["cxx"]


def test_a_sandbox_that_fails_is_no_fault_of_the_code(compiler, monkeypatch):
    ended = sandbox.Finished(125, "sandbox: cannot mount", False, None)
    monkeypatch.setattr(sandbox.Sandbox, "run", lambda *a, **k: ended)
    with pytest.raises(RuntimeError, match=r"^the compiler could not be run: sandbox: cannot mou"):
        compile.build("int x;", parts=PARTS)


def test_a_source_cannot_play_the_sandbox(compiler):
    built = compile.build('\n#error "sandbox: cannot mount"\n', parts=PARTS)
    assert built.reason == 'archive_kernel.cpp:2:2: error: #error "sandbox: cannot mount"'


def flags_of(ran: list[str]) -> list[str]:
    return [argument for argument in ran if argument.startswith("-D")]


def test_what_needs_all_headers_is_compiled_with_them(cache, monkeypatch):
    monkeypatch.setattr(compile, "check_compilers", lambda cuda: "compiler")
    ran = []

    def run(box, command, **settings):
        ran.append(command)
        status = 0 if not flags_of(command) else 1
        if status == 0:
            (Path(command[-len(compile.FLAGS) - 1]) / f"{compile.NAME}.so").write_text("made")
        return sandbox.Finished(status, "error: no nn", False, None)

    monkeypatch.setattr(sandbox.Sandbox, "run", run)
    built = compile.build("#include <torch/extension.h>", parts=PARTS, cuda=False)
    assert built.library.read_text() == "made"
    assert [flags_of(command) for command in ran] == [list(compile.FEWER_HEADERS), []]
    ran.clear()
    assert compile.build("#include <vector>", parts=PARTS, cuda=False).library is not None
    assert [flags_of(command) for command in ran] == [[]]


def test_pytorch_has_the_switch_for_fewer_headers():
    """Without it compiling works as well, and takes longer."""
    header = Path(torch.__file__).parent / "include" / "torch" / "extension.h"
    (switch,) = compile.FEWER_HEADERS
    assert f"#ifndef {switch.removeprefix('-D')}" in header.read_text()
