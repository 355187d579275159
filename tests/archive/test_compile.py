"""Compiling in a sandbox: what is kept, what is said, what is not run."""

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
