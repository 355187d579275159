"""docs/distributed.md: its Python runs on any number of ranks, its command lines are taken."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from ranks import run_ranks

import fastshard
from fastshard import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("size", [1, 2])
def test_python_runs_on_ranks(size):
    (block,) = blocks("python")
    printed = run_ranks(size, "page_programs:run_block", block)
    assert printed[1:] == [""] * (size - 1)
    texts = ["", ""]
    for line in printed[0].splitlines():
        index, piece = line.split(" ", 1)
        texts[int(index)] += ast.literal_eval(piece)
    model = fastshard.load(device="cpu")
    prompts = ("def ", "import ")
    room = [64 - len(model.tokenizer.encode(prompt)) for prompt in prompts]  # of the page's context
    assert texts == [
        "".join(model.stream(prompt, max_new_tokens=room[i], seed=i))
        for i, prompt in enumerate(prompts)
    ]


def test_command_lines_are_taken():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    assert len(lines) > 3
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "torchrun"
        ours = words[words.index("fastshard") + 1 :]
        args = cli.build_parser().parse_args(ours)
        assert args.run.__module__ == "fastshard.generate_command"
