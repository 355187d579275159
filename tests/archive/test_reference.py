"""The process of a row's own PyTorch code, in its sandbox: what it times."""

import pytest
import torch

from archive import corpus
from emulator.build import MissingTool, compiler
from fastshard.archive import cases, reference, sandbox, trees
from fastshard.archive.foreign import Foreign
from fastshard.archive.trial import REFERENCE_SECONDS
from helpers import skip_or_fail


@pytest.fixture
def ask(device, tmp_path):
    """Asks the process of a softmax, which has written two sets of inputs."""
    code = tmp_path / "reference.py"
    code.write_text(corpus.reference("right"))
    limits = sandbox.Limits(resident_bytes=12 * sandbox.GIB)
    with sandbox.temporary(limits, sandbox.allowed_parts(), [code]) as box:
        process = Foreign("fastshard.archive.reference:answer", box, REFERENCE_SECONDS)

        def ask(step: str, **request) -> dict:
            return process.ask(do=step, device=str(device), dtype="float32", **request)

        with process:
            ask("read", code=str(code), seed=0)
            contents = [str(box.scratch / f"content{i}") for i in range(2)]
            for path, content in zip(contents, cases.CONTENTS, strict=False):
                ask("make", shape=0, content=content, seed=0, path=path)
            yield lambda **request: ask("time", contents=contents, rounds=3, **request), process


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
def test_torch_compile_is_timed_beside_eager(ask):
    """In a sandbox it finds its compiler, and writes its caches to the empty home."""
    time, process = ask
    try:
        compiler()
    except MissingTool as error:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", str(error))
    said = time(compiles=True, kind=None)
    assert said["notes"] == ["no op of fastshard computes this alone"], process.errors
    assert set(said["us"]) == {"eager", "compile"}, process.errors
    assert all(us > 0 for us in said["us"].values())


def test_a_compiler_that_fails_is_noted_with_its_reason(monkeypatch, tmp_path):
    path = tmp_path / "content"
    trees.save(path, trees.pack((torch.randn(4, 8), 0)))

    def fail(function):
        raise ValueError("not\ntoday")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(reference, "_tasks", [cases.read_task(corpus.reference("right"))])
    asked = {"do": "time", "contents": [str(path)], "device": "cpu", "rounds": 1, "kind": None}
    with torch.no_grad():  # which the process turns off for itself
        *_, said = reference.answer({**asked, "compiles": True})
    assert set(said["us"]) == {"eager"}
    assert said["notes"][1:] == ["torch.compile failed: ValueError: not today"]
