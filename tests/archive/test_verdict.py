"""Verdicts and their files."""

import json

import pytest

from fastshard.archive import verdict
from fastshard.archive.verdict import Verdict

GOOD = Verdict(
    "1/23/softmax_a",
    verdict.VERIFIED,
    op_name="23_Softmax",
    claimed={"native": 4.0, "compile": None},
    times={"float32": {"candidate": 2.0, "eager": 5.0}},
    notes=("compile was not timed",),
    environment={"torch": "2.11"},
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSHARD_CACHE_DIR", str(tmp_path))


def test_a_verdict_comes_back():
    verdict.save(GOOD)
    assert verdict.load(GOOD.id) == GOOD
    assert verdict.load("1/23/other") is None


def test_an_earlier_one_is_replaced():
    verdict.save(GOOD)
    later = Verdict(GOOD.id, verdict.HUNG, "no answer for 3 s")
    verdict.save(later)
    assert verdict.load_all() == [later]


@pytest.mark.parametrize(
    "identity", ["../../escape", "..", "/etc/passwd", "a\0b", "x" * 500, "1/23/ünïcode kernel"]
)
def test_no_name_leaves_the_folder(identity):
    path = verdict.save(Verdict(identity, verdict.CRASHED))
    assert path.parent.resolve() == verdict.verdicts_dir().resolve()
    assert [found.id for found in verdict.load_all()] == [identity]


def test_ids_that_are_cut_alike_do_not_collide():
    first, second = "x" * 200 + "a", "x" * 200 + "b"
    assert verdict.path_of(first) != verdict.path_of(second)


def test_a_speedup_is_of_what_is_verified():
    assert GOOD.speedup() == 2.5
    assert GOOD.speedup("compile") is None
    assert GOOD.speedup("eager", "float16") is None
    assert Verdict("a", verdict.TOO_FAST, times=GOOD.times).speedup() is None


def test_refuses_what_is_no_verdict():
    with pytest.raises(ValueError, match=r"^verdict must be one of verified, .*, got 'fine'$"):
        Verdict("a", "fine")


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "a"}', '{"id": "a", "verdict": "fine"}'])
def test_a_file_that_is_none_is_named(text):
    path = verdict.path_of("a")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path} is no verdict of fastshard archive verify: "):
        verdict.load("a")


def test_a_field_of_a_later_version_is_passed_over():
    path = verdict.save(GOOD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert verdict.load(GOOD.id) == GOOD
