"""Environment variables: where the cache is, how tokens are decoded."""

from pathlib import Path

import pytest

from fastshard.environment import cache_dir, decode_mode


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "/home/ann/.cache/fastshard"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fastshard"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/ann/.cache/fastshard"),
        ({"XDG_CACHE_HOME": ""}, "/home/ann/.cache/fastshard"),
        ({"XDG_CACHE_HOME": "/x", "FASTSHARD_CACHE_DIR": "/y"}, "/y"),
        ({"FASTSHARD_CACHE_DIR": ""}, "/home/ann/.cache/fastshard"),
    ],
)
def test_cache_dir(monkeypatch, variables, expected):
    for name in ("FASTSHARD_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize(("value", "expected"), [(None, "auto"), ("", "auto"), ("graph", "graph")])
def test_decode_mode(monkeypatch, value, expected):
    monkeypatch.delenv("FASTSHARD_DECODE", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTSHARD_DECODE", value)
    assert decode_mode() == expected
