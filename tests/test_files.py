"""Files that are written whole or not at all."""

import os

import pytest

from fastshard.files import replace_text


def test_writes_over_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one\n", "two\n"):
        replace_text(path, text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_failure_leaves_what_was_there(fails, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    if fails == "replace":
        monkeypatch.setattr(os, "replace", fail)
    text = "new" if fails == "replace" else "\ud800"  # a lone surrogate has no encoding
    with pytest.raises((OSError, UnicodeEncodeError)):
        replace_text(path, text)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
