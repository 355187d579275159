"""Environment variables: where the cache is, how tokens are decoded."""

from pathlib import Path

import pytest

from fastshard.environment import (
    cache_dir,
    decode_mode,
    launch_attempt,
    launcher_error_file,
    sum_way,
)


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


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "group"), ("", "group"), ("one_shot", "one_shot")]
)
def test_sum_way(monkeypatch, value, expected):
    monkeypatch.delenv("FASTSHARD_SUMS", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTSHARD_SUMS", value)
    assert sum_way() == expected


@pytest.mark.parametrize(("value", "expected"), [(None, 0), ("", 0), ("2", 2)])
def test_launch_attempt(monkeypatch, value, expected):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", value)
    assert launch_attempt() == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("", None), ("/x/error.json", Path("/x/error.json"))]
)
def test_launcher_error_file(monkeypatch, value, expected):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", value)
    assert launcher_error_file() == expected
