"""Which rows are compiled ahead of the one that is tried."""

import threading

import pytest
import torch

from archive.parquet_rows import write_rows
from fastshard.archive import compile, sandbox, schema, source, verdict, verify_command
from fastshard.archive import verify as verify_module
from fastshard.archive.trial import Settings

SECONDS = 60.0
NAMES = ("a", "b", "c", "d")
IDS = [f"1/36/{name}" for name in NAMES]


class Verifier:
    """Stands for the real one: keeps what was asked of it."""

    device_name = "a GPU"

    def __init__(self, settings):
        self.built, self.tried = [], []
        self.changed = threading.Condition()
        Verifier.made = self

    def build(self, row):
        with self.changed:
            self.built.append(row.id)
            self.changed.notify_all()
        if row.id == Verifier.fails_at:
            raise RuntimeError("there is no nvcc")
        return f"built {row.id}"

    def judge(self, row, built):
        assert built == f"built {row.id}"
        expected = Verifier.ahead[len(self.tried)]
        with self.changed:
            self.changed.wait_for(lambda: len(self.built) >= expected, SECONDS)
            assert sorted(self.built) == Verifier.rows[:expected]
        self.tried.append(row.id)
        return verdict.Verdict(row.id, verdict.WRONG, "why", code_sha256="0")


@pytest.fixture
def verify(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sandbox, "missing_parts", dict)
    monkeypatch.setattr(verify_command, "Verifier", Verifier)
    monkeypatch.setattr(Verifier, "fails_at", None, raising=False)
    monkeypatch.setattr(Verifier, "ahead", None, raising=False)
    monkeypatch.setattr(Verifier, "rows", IDS, raising=False)
    source.fetch(write_rows(tmp_path / "a.parquet", *({"Kernel_Name": name} for name in NAMES)))

    def run(device="cuda", **settings):
        said = []
        verify_command.run(IDS, trusts_code=True, device=device, say=said.append, **settings)
        return said

    return run


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [
        ({"jobs": 0}, [1, 2, 3, 4]),
        ({}, [2, 3, 4, 4]),
        ({"jobs": 2}, [3, 4, 4, 4]),
        ({"jobs": 9}, [4, 4, 4, 4]),
        ({"jobs": 2, "device": "cpu"}, [1, 2, 3, 4]),  # whose timings it would disturb
    ],
)
def test_the_next_rows_are_compiled_while_one_is_tried(verify, monkeypatch, settings, ahead):
    monkeypatch.setattr(Verifier, "ahead", ahead)
    said = verify(**settings)
    assert Verifier.made.tried == IDS
    assert said[:4] == [f"{each}: wrong; why" for each in IDS]
    assert [each.id for each in verdict.load_all()] == IDS


def test_what_has_a_verdict_is_not_compiled(verify, monkeypatch):
    monkeypatch.setattr(verify_command, "_is_known", lambda row, device: row.id == IDS[0])
    monkeypatch.setattr(Verifier, "rows", IDS[1:])
    monkeypatch.setattr(Verifier, "ahead", [2, 3, 3])
    assert verify()[0] == f"{IDS[0]}: has a verdict; --again verifies it again"
    assert Verifier.made.tried == IDS[1:]


def test_a_compiler_that_cannot_run_ends_it_where_it_is_needed(verify, monkeypatch):
    monkeypatch.setattr(Verifier, "ahead", [3, 4, 4, 4])
    monkeypatch.setattr(Verifier, "fails_at", IDS[2])
    with pytest.raises(RuntimeError, match=r"^there is no nvcc$"):
        verify(jobs=2)
    assert Verifier.made.tried == IDS[:2]


def test_a_row_that_lacks_a_part_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compile, "check_compilers", lambda *, cuda: "a compiler")
    compiled = []
    monkeypatch.setattr(compile, "build", lambda code, **settings: compiled.append(code) or "built")
    verifier = verify_module.Verifier(Settings(torch.device("cpu"), parts=[]))
    whole = {"CUDA_Code": "int x;", "PyTorch_Code_Functional": "pass"}

    def build(**columns):
        return verifier.build(schema.row_of(whole | columns, "a", "here"))

    for column in whole:
        assert [build(**{column: text}) for text in (None, "", " ")] == [None] * 3
    with pytest.raises(RuntimeError, match=r"^a is CUDA code, which needs nvcc and a GPU$"):
        build(CUDA_Code="__global__ void kernel() {}")
    assert compiled == []
    assert build() == "built"
    assert compiled == ["int x;"]
