"""The guide's blocks run as written, in order, but for those whose marker says what they need."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded_graphs import pretend_to_capture

import fastshard
from helpers import CUDA_ONLY

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text()
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)```", re.S)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(GUIDE)]
TEXT = re.sub(r"```.*?```", "", GUIDE, flags=re.S)


def code(kind: str, needs: str | None = None) -> list[str]:
    return [b["code"] for b in BLOCKS if b["kind"] == kind and b["needs"] == needs]


def test_all_blocks_are_of_a_kind_that_is_run():
    assert {(block["kind"], block["needs"]) for block in BLOCKS} == {
        ("python", None),
        ("python", "GPU"),
        ("pycon", None),
        ("sh", None),
        ("sh", "network"),
    }


def test_python_runs(capsys):
    """All blocks in one namespace, then the errors as a doctest."""
    names = {"__name__": "guide"}
    for block in code("python"):
        exec(compile(block, "docs/guide.md", "exec"), names)
    assert len(capsys.readouterr().out) > 50
    torch._dynamo.reset()
    examples = doctest.DocTestParser().get_doctest(
        "".join(code("pycon")), names, "errors", "docs/guide.md", 0
    )
    assert len(examples.examples) > 5
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(examples, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@CUDA_ONLY
def test_python_for_a_gpu_runs(device):
    names = {}
    for block in code("python", "GPU"):
        exec(compile(block, "docs/guide.md", "exec"), names)
    assert names["step"].slots.item() == names["tokens"].shape[1] + 10


def test_prompts_from_graphs_run(monkeypatch, capsys):
    """On the CPU, whose graphs are recordings."""
    graphs = pretend_to_capture(monkeypatch)
    prompts, _ = code("python", "GPU")
    names = {}
    exec(prompts.replace('"cuda"', '"cpu"'), names)
    assert names["model"].prompt_graphs.lengths == [32, 128, 512]
    assert len(graphs) == 1 + 3  # the prompts fit into 32 tokens; and each text's steps
    assert len(capsys.readouterr().out) > 20


def test_python_for_a_gpu_counts_right():
    """On the CPU, each replay a call: the same tokens as ``generate_batch``."""
    _, block = code("python", "GPU")
    block = block.replace('"cuda"', '"cpu"')
    call = "logits = decoder(token, step=step, num_logits=1)"
    before, rest = block.split("side = ")
    loop = rest[rest.index("for _ in") :].replace("graph.replay()", call)
    names = {"kept": []}
    keep = "    kept.append(token.item())\n"
    exec(
        f"{before}kept.append(token.item())\n{loop}".replace(
            "decoder.raise", keep + "decoder.raise"
        ),
        names,
    )
    model = names["model"]
    (expected,) = fastshard.generate_batch(model, names["tokens"].tolist(), max_new_tokens=11)
    assert names["kept"] == expected


@pytest.mark.parametrize("block", code("sh"))
def test_shell_runs(block, tmp_path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",  # for so small a model more of them wait for each other
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "fastshard" in path.name]
    assert result.stdout or len(written) == 3


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) > 5
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert missing == []


def test_quoted_messages_are_those_of_the_code():
    """What the table quotes stands in the sources, between the values."""
    sources = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in ROOT.glob("fastshard/**/*.py")
    )
    quoted = re.findall(r'^\| [^|]*?"([^"]+)"', TEXT, flags=re.M)
    assert len(quoted) > 4
    for message in quoted:
        for part in re.split(r"\.\.\.| X| Y|persistent|graph", message):
            assert part.strip(" ,:") in sources, part
