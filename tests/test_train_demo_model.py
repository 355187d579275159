"""The training script of the embedded model: what it writes loads, and is what was embedded."""

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import fastshard
from fastshard.loading import demo_model

SCRIPT = Path(__file__).parent.parent / "examples" / "train_demo_model.py"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo_model"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(script):
    """Enough of the standard library for all 2048 tokens."""
    return script.read_sources()[:40]


@pytest.fixture(scope="module")
def trained(script, texts, tmp_path_factory):
    """A run of a second over two layers."""
    output = tmp_path_factory.mktemp("demo")
    options = "--minutes 0.02 --device cpu --window 32 --batch-tokens 64 --evaluations 2 --cuts 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Config", functools.partial(script.Config, **SMALL))
        patch.setattr(script, "read_sources", lambda: texts)
        patch.setattr(sys, "argv", ["train", "--output", str(output), *options.split()])
        script.main()
    return output


def test_what_it_writes_streams(trained):
    model = fastshard.load(trained, device="cpu")
    assert model.config.num_layers == 2
    assert "".join(model.stream("def ", max_new_tokens=8))
    loss = float(re.search(r"loss: ([\d.]+) nats", (trained / "README.md").read_text())[1])
    assert 2 < loss < 8


def test_what_is_embedded_was_written_by_it(trained):
    """Same files and settings; weights, vocabulary and numbers differ."""
    assert {p.name for p in trained.iterdir()} | {"LICENSE.txt"} == {
        p.name for p in demo_model().iterdir()
    }
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (trained / name).read_text() == (demo_model() / name).read_text()
    ours, theirs = (
        json.loads((path / "tokenizer.json").read_text()) for path in (trained, demo_model())
    )
    for part in ("pre_tokenizer", "decoder", "post_processor", "added_tokens", "normalizer"):
        assert ours[part] == theirs[part], part
    embedded = json.loads((demo_model() / "config.json").read_text())
    changed = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    written = json.loads((trained / "config.json").read_text())
    assert {k: v for k, v in written.items() if k not in changed} == {
        k: v for k, v in embedded.items() if k not in changed
    }


def test_sources_are_code(texts):
    assert len(texts) == len(set(texts)) == 40
    assert all("\0" not in text for text in texts)


def test_cut_streams_are_the_same_text(script, texts, trained):
    import random

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    whole, cut = (script.encode(tokenizer, texts[:3], rng) for rng in (None, random.Random(0)))
    assert tokenizer.decode(whole.tolist()) == "".join(texts[:3])
    assert len(cut) > len(whole)
    assert (cut == 0).sum() == (whole == 0).sum() == 3
    decoded = tokenizer.decode(cut.tolist())
    assert sorted(decoded) == sorted("".join(texts[:3]))
    assert all(text in decoded for text in texts[:3])
