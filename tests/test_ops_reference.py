"""docs/ops.md is what its script writes from the docstrings of the installed package."""

import importlib.util
from pathlib import Path
from types import FunctionType

import pytest

from fastshard import ops

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "make_ops_reference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_ops_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert script.PAGE.read_text() == script.page(), "run python docs/make_ops_reference.py"


def test_a_changed_docstring_or_signature_shows(script, monkeypatch):
    page = script.page()
    monkeypatch.setattr(ops.rms_norm, "__doc__", "Scale each row.\n\nArgs:\n    x: ``[n]``.\n")
    changed = script.page()
    assert changed != page
    assert "\nScale each row.\n\n**Args**\n\n- `x`: `[n]`.\n" in changed


def test_every_public_op_is_there(script):
    page = script.PAGE.read_text()
    functions = [name for name in ops.__all__ if isinstance(getattr(ops, name), FunctionType)]
    assert len(functions) > 15
    for name in functions:
        assert f"\n## {name}\n" in page
        assert f"\n{name}(" in page
    assert "``" not in page.replace("```", "")
    assert ":func:" not in page
