"""The short examples run as their docstrings say, and what they print is what the library gives."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import fastshard

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPT = "def "


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script on the CPU: what it prints."""
    monkeypatch.setattr(fastshard.ops, "HAS_KERNELS", False)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def model():
    return fastshard.load(device="cpu")


def test_every_example_has_a_test():
    """This file runs it, or another one imports it by its name."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(names) >= 5
    assert {
        name for name in names if name not in tests and f"import {name[:-3]}" not in tests
    } == set()


def test_generate(run, model):
    form = r"(.*)\n\[(\d+) tokens, [\d.]+ s after the first\]\n(.*)"
    text, num_tokens, rest = re.fullmatch(form, run("generate.py", PROMPT), re.DOTALL).groups()
    settings = {"max_new_tokens": 40, "temperature": 0.7, "top_p": 0.9, "seed": 1}
    stream = model.stream(PROMPT, **settings)
    assert text == "".join(stream)
    assert int(num_tokens) == stream.num_tokens > 10
    prompts = [model.tokenizer.encode(words) for words in (PROMPT, "import ", "class Test")]
    rows = fastshard.generate_batch(model, prompts, max_new_tokens=10)
    assert rest.splitlines() == [f"{row} {model.tokenizer.decode(row)!r}" for row in rows]
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        run("generate.py", PROMPT, "./no-such-folder")


def test_two_shards(run, model):
    prompt = model.tokenizer.encode(PROMPT)
    (tokens,) = fastshard.generate_batch(model, [prompt], max_new_tokens=20)
    assert run("two_shards.py", PROMPT) == PROMPT + model.tokenizer.decode(tokens) + "\n"


def test_compile_model(run):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    lines = run("compile_model.py").splitlines()
    assert [line.split()[0] for line in lines] == ["5", "16", "33"]
    differences = [float(re.search(r"differ by (\S+)$", line)[1]) for line in lines]
    assert max(differences) == 0  # the same ops in the same order
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
