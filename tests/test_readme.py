"""The README's Python runs as written, and it lists every environment variable that is read."""

import re
from pathlib import Path

from fastshard.integrations.replacement import Replacements

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys):
    shards, adapter = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(shards, names)
    _, expected = names["model"].generate(names["tokens"])
    assert names["logits"].equal(expected)  # two shards are the whole model
    assert len(capsys.readouterr().out) > 20
    plain, accelerated = {}, {}
    exec(adapter.replace("accelerate(model)", "model.set_attn_implementation('eager')"), plain)
    exec(adapter, accelerated)
    assert Replacements.of(plain["model"]) is None
    assert Replacements.of(accelerated["model"]) is not None
    assert accelerated["tokens"].shape == (1, 21)
    assert accelerated["tokens"].equal(plain["tokens"])


def test_environment_variables_are_listed():
    sources = [*ROOT.glob("fastshard/**/*.py"), ROOT / "setup.py"]
    read = {
        name
        for path in sources
        for name in re.findall(r"environ\b[^\n]*\"(FASTSHARD_\w+)\"", path.read_text())
    }
    assert read
    assert {name for name in read if f"`{name}`" not in README} == set()
