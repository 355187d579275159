"""The example runs, and both ways generate the same tokens."""

import ast
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "torchtune_accelerate.py"


def test_both_ways_give_the_same_tokens(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, second, hidden = capsys.readouterr().out.splitlines()
    ours, theirs = (ast.literal_eval(line.partition(":")[2].strip()) for line in (first, second))
    assert ours[:5] == [3, 141, 59, 26, 53]
    assert len(ours) == 13
    assert ours == theirs
    assert hidden == "hidden state of the first layer: [1, 5, 64]"
