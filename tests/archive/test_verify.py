"""Every kernel of the corpus gets its verdict and reason, through sandboxed processes.

On a CPU the kernels are C++, on a GPU the same tricks in CUDA.
"""

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from archive import corpus, shared_builds
from fastshard import cli
from fastshard.archive import compile, foreign, sandbox, schema, trial, verdict, verify_command
from fastshard.archive.trial import Settings
from fastshard.archive.verify import Verifier
from helpers import CPU_ONLY, CUDA_ONLY, skip_or_fail

MEMORY = {"cpu": 3 * sandbox.GIB, "cuda": 12 * sandbox.GIB}
SECONDS = 240.0  # of a call: what hangs is waited for, what does not is on a busy machine
HANG_SECONDS = {"cpu": 8.0, "cuda": 15.0}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return shared_builds.folder_of(tmp_path_factory)


@pytest.fixture(autouse=True)
def cache(builds, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(builds))
    shared_builds.compile_once(monkeypatch, builds)


class Watched(foreign.Foreign):
    """Keeps how its processes ended, for the message of a test that fails."""

    seen: ClassVar[list[str]] = []

    def __init__(self, target, box, timeout):
        super().__init__(target, box, timeout)
        self.target = target

    def __exit__(self, *exception):
        running = self._process is not None and self._process.poll() is None
        super().__exit__(*exception)
        status = self._process and self._process.returncode
        how = "was running until the end" if running else f"had ended with status {status}"
        self.seen.append(f"{self.target} {how}, stderr:\n{self.errors[-3000:]}")


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    monkeypatch.setattr(trial, "Foreign", Watched)
    monkeypatch.setattr(Watched, "seen", [])


def described(found: verdict.Verdict) -> str:
    """All that is known of a verdict that a test did not expect."""
    return "\n".join([repr(found), *Watched.seen])


def verifier_on(device: torch.device, **changes) -> Verifier:
    settings = {
        "parts": sandbox.allowed_parts(),
        "timeout": SECONDS,
        "resident_bytes": MEMORY[device.type],
        "compiles": False,
    } | changes
    try:
        return Verifier(Settings(device, **settings))
    except RuntimeError as error:
        kind = "GPU" if device.type == "cuda" else "EMULATOR"  # which needs a compiler too
        skip_or_fail(f"FASTSHARD_REQUIRE_{kind}", str(error))


def row_of(name: str, device: torch.device) -> schema.Row:
    values = corpus.row(name, "cu" if device.type == "cuda" else "cpp")
    return schema.row_of(values, f"1/23/{name}", "the corpus")


def check(name: str, device: torch.device, **changes) -> verdict.Verdict:
    timeout = HANG_SECONDS[device.type] if name == "hangs" else SECONDS
    verify, expected = verifier_on(device, timeout=timeout, **changes), corpus.ENTRIES[name]
    try:
        found = verify(row_of(name, device))
    except RuntimeError as error:
        pytest.fail("\n".join([str(error), *Watched.seen]))
    assert found.verdict == expected.verdict, described(found)
    assert re.fullmatch(expected.reason, found.reason, re.DOTALL), described(found)
    return found


@CPU_ONLY
@pytest.mark.parametrize("name", [n for n in corpus.CPU_NAMES if n not in ("right", "forks")])
def test_a_trick_gets_its_verdict_and_reason(name, device):
    check(name, device)


@CUDA_ONLY
@pytest.mark.parametrize("name", [n for n in corpus.CUDA_NAMES if n != "right"])
def test_a_trick_in_cuda_gets_its_verdict_and_reason(name, device):
    check(name, device)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
def test_a_right_kernel_is_verified_and_timed(device):
    found = check("right", device)
    assert set(found.times) == {"float32", "float16"}, described(found)
    for times in found.times.values():
        assert set(times) == {"candidate", "eager"}
        assert all(us > 0 for us in times.values())
    assert found.notes == (
        "no op of fastshard computes this alone",
        "float16: no op of fastshard computes this alone",
    )
    assert found.claimed == {"native": 4.0, "compile": 5.0}
    assert found.environment["isolation"] == (", ".join(sandbox.allowed_parts()) or "limits alone")


@pytest.mark.parametrize(
    ("code", "dtypes"), [("float", ["float32"]), ("__half", ["float32", "float16"])]
)
def test_what_names_no_half_precision_is_not_tried_in_it(monkeypatch, code, dtypes):
    verifier = verifier_on(torch.device("cpu"))
    built, tried = compile.Built(Path("x.so"), None, Path()), []
    monkeypatch.setattr(Verifier, "build", lambda self, row: built)

    def judge(self, row, built, dtype):
        tried.append(dtype)
        return trial.Seen(times={"candidate": 1.0})

    monkeypatch.setattr(Verifier, "_try", judge)
    values = corpus.row("right") | {"CUDA_Code": code}
    found = verifier(schema.row_of(values, "a", "here"))
    assert tried == list(found.times) == dtypes
    said = "float16 was not tried: the source does not name it"
    assert found.notes == (() if "float16" in dtypes else (said,))


@CPU_ONLY
def test_nothing_that_a_kernel_forks_is_left(device, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Without namespaces no kernel of the system ends it either.
    check("forks", device, parts=[])
    left = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            left.append(os.readlink(cwd))
    assert os.getcwd() in left
    assert [folder for folder in left if folder.startswith(str(tmp_path))] == []


@CPU_ONLY
def test_code_for_a_gpu_is_not_judged_without_one(device):
    values = corpus.row("right") | {"CUDA_Code": "__global__ void kernel() {}"}
    with pytest.raises(RuntimeError, match=r"^a is CUDA code, which needs nvcc and a GPU$"):
        verifier_on(device)(schema.row_of(values, "a", "here"))


@pytest.fixture
def fetched(builds, tmp_path, monkeypatch, capsys):
    """An archive of two kernels, in a cache of its own with the builds of the others."""
    own = tmp_path / "cache"
    shared_builds.use(builds, own)
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(own))
    corpus.write_parquet(tmp_path / "level_1.parquet", ["nulls", "wrong"])
    assert cli.main(["archive", "fetch", "--source", str(tmp_path / "level_1.parquet")]) == 0
    capsys.readouterr()
    return own


def refuse_to_run(*arguments, **named):
    raise AssertionError("foreign code was compiled or run")


def test_without_consent_nothing_is_compiled_or_run(fetched, monkeypatch, capsys):
    monkeypatch.setattr(sandbox.Sandbox, "start", refuse_to_run)
    monkeypatch.setattr(compile, "build", refuse_to_run)
    assert cli.main(["archive", "verify", "1/23/wrong"]) == 1
    assert capsys.readouterr().err == (
        "fastshard: error: archive verify compiles and runs foreign native code, which nobody has "
        "read, on this machine: nothing was compiled or run; read it by archive show, and pass "
        "--i-trust-this-code\n"
    )
    assert verdict.load_all() == []


def test_without_isolation_from_the_network_it_asks_again(fetched, monkeypatch, capsys):
    missing = {"network": "no namespaces", "files": "none either"}
    monkeypatch.setattr(sandbox, "missing_parts", lambda: missing)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.Sandbox, "start", refuse_to_run)
        assert cli.main(["archive", "verify", "1/23/nulls", "--i-trust-this-code"]) == 1
    assert capsys.readouterr().err == (
        "fastshard: error: foreign code would have the network, which this machine does not let be "
        "taken away (no namespaces): nothing was compiled or run; pass "
        "--without-network-isolation to run it so\n"
    )
    verifier_on(torch.device("cpu"))  # or skip
    arguments = ["1/23/nulls", "--i-trust-this-code", "--without-network-isolation"]
    assert cli.main(["archive", "verify", *arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "warning: no isolation of network: no namespaces\n" in out
    assert "warning: no isolation of files: none either\n" in out
    (found,) = verdict.load_all()
    assert found.environment["isolation"] == "processes"


def test_it_needs_to_know_what(fetched, capsys):
    assert cli.main(["archive", "verify", "--i-trust-this-code"]) == 1
    said = "archive verify needs an ID, --op, --level or --min-speedup\n"
    assert capsys.readouterr().err == f"fastshard: error: {said}"
    verifier_on(torch.device("cpu"))  # or skip
    assert cli.main(["archive", "verify", "1/99", "--i-trust-this-code", "--device", "cpu"]) == 1
    assert "id must be one of the archive, or its beginning, got '1/99'" in capsys.readouterr().err


def test_without_a_compiler_it_says_so(fetched, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["archive", "verify", "1/23/wrong", "--i-trust-this-code", "--device", "cpu"]
    assert cli.main(arguments) == 1
    said = "compiling needs a C++ compiler, and there is no no-such-compiler: set CXX\n"
    assert capsys.readouterr().err == f"fastshard: error: {said}"
    assert verdict.load_all() == []


@CPU_ONLY
def test_verdicts_are_kept_and_not_made_twice(fetched, device, capsys, monkeypatch):
    verifier_on(device)  # or skip
    arguments = ["archive", "verify", "--op", "softmax", "--i-trust-this-code", "--device", "cpu"]
    assert cli.main([*arguments, "--timeout", f"{SECONDS}s"]) == 0
    out = capsys.readouterr().out
    assert "1/23/wrong: wrong; as published, [32, 96]: largest error " in out
    found = verdict.load("1/23/wrong")
    assert (found.verdict, found.op_name) == (verdict.WRONG, "23_Softmax")
    monkeypatch.setattr(verify_command.Verifier, "build", refuse_to_run)
    assert cli.main(arguments) == 0
    said = "1/23/wrong: has a verdict; --again verifies it again\n"
    assert said in capsys.readouterr().out
    with pytest.raises(AssertionError, match="foreign code was"):
        cli.main([*arguments, "--again"])


def test_a_line_says_times_and_commands_no_terminal():
    times = {"float32": {"candidate": 1.5, "eager": 3.25}}
    good = verdict.Verdict("a", verdict.VERIFIED, times=times, notes=["x"])
    assert verify_command.line(good) == "a: verified; float32: candidate 1.5 us, eager 3.25 us; x"
    bad = verdict.Verdict("b\x1b[2J", verdict.WRONG, "c\n\x07d", times=times)
    assert verify_command.line(bad) == r"b\x1b[2J: wrong; c \x07d"
