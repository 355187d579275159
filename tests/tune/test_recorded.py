"""Studies on disk: written, read, played back, gone on with."""

import json
import math
from dataclasses import asdict
from importlib.metadata import version

import pytest

from fastshard.tune import recorded
from fastshard.tune.problem import Measurement, Problem, rejected
from fastshard.tune.recorded import Recorder, Replay, Study

PROBLEM = Problem("linear", "bfloat16", (4, 64, 128))
OTHER = Problem("rms_norm", "float16", (4, 64))
FAST = Measurement(8.0, 7.0, 9.0, 10.0, 1.0, 1e-3, None, 0.5)
SLOW = Measurement(12.0, 11.0, 13.0, 10.0, 1.0, 1e-3, None, 0.25)


def study() -> Study:
    made = Study("GPU", version("fastshard"))
    made.keep(PROBLEM, "library", FAST)
    made.keep(PROBLEM, "stream", rejected("crashed", 0.125))
    made.keep(PROBLEM, "library", SLOW, is_confirmed=True)
    return made


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "study.json"
    study().write(path)
    read = recorded.read(path)
    assert (read.device, len(read)) == ("GPU", 3)
    assert read.get(PROBLEM, "library") == FAST
    assert read.get(PROBLEM, "library", is_confirmed=True) == SLOW
    assert read.get(PROBLEM, "stream").reason == "crashed"
    assert read.variants(PROBLEM) == ["library", "stream"]
    assert read.get(OTHER, "library") is None
    again = tmp_path / "again.json"
    read.write(again)
    assert again.read_bytes() == path.read_bytes()


def changed(**change) -> str:
    content = {"format": 1, "device": "GPU", "fastshard": version("fastshard"), "measurements": []}
    return json.dumps(content | change)


ENTRY = asdict(OTHER) | {"variant": "512x1", "is_confirmed": False} | asdict(FAST)


def with_entry(**change) -> str:
    return changed(measurements=[ENTRY | change])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(device=3), "its device is 3, no name"),
        (with_entry(shape=["1", 2]), "rms_norm float16 1x2 is no problem"),
        (with_entry(shape=[0, 2]), "rms_norm float16 0x2 is no problem"),
        (with_entry(op=["rms_norm"]), "TypeError"),
        (with_entry(dtype=16), "rms_norm 16 4x64 is no problem"),
        (with_entry(us="8"), "512x1 has neither times nor a reason"),
        (with_entry(us=0), "neither times"),
        (with_entry(auto_us=None), "neither times"),
        (with_entry(us=None), "neither times"),
        (with_entry(seconds=None), "neither times"),
        (with_entry(speed=3), "TypeError: .* 'speed'"),
        ("{", "Expecting property name"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        (changed(format=2), "its format is 2, not 1"),
        (changed(fastshard="0.0.1"), "it is of fastshard 0.0.1, not"),
        (changed(measurements=[{"shape": [1]}]), "KeyError: 'op'"),
        (
            changed(measurements=[{"op": "linear", "dtype": "float16", "shape": [1]}]),
            "linear float16 1 is no problem",
        ),
        (
            changed(
                measurements=[{"op": "rms_norm", "dtype": "a", "shape": [1, 2], "variant": "x"}]
            ),
            "KeyError: 'is_confirmed'",
        ),
    ],
)
def test_other_files_are_refused_by_name(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=f"bad.json must be a study of fastshard tune: .*{message}"
    ):
        recorded.read(path)


def test_playing_back():
    replay = Replay(study())
    assert replay.device == "GPU"
    library, stream, none = replay(PROBLEM, ["library", "stream", "auto"])
    assert (library, stream.reason, none.reason) == (FAST, "crashed", "not in the study")
    assert none.ratio == math.inf
    assert replay.confirm(PROBLEM, "library") == SLOW
    assert replay.confirm(PROBLEM, "stream").reason == "crashed"


class Counting:
    """A measurer that says what it was asked."""

    device = "GPU"

    def __init__(self):
        self.asked = []

    def __call__(self, problem, variants):
        self.asked.append((problem, *variants))
        return [FAST for _ in variants]

    def confirm(self, problem, variant):
        self.asked.append((problem, variant, "confirm"))
        return SLOW


def test_a_recorder_measures_nothing_twice_and_keeps_all_on_disk(tmp_path):
    path = tmp_path / "study.json"
    measurer = Counting()
    recorder = Recorder(measurer, study(), path)
    assert recorder(PROBLEM, ["library", "new"]) == [FAST, FAST]
    assert measurer.asked == [(PROBLEM, "new")]
    assert recorded.read(path).get(PROBLEM, "new") == FAST
    Recorder(measurer, recorded.read(path), path)(PROBLEM, ["new", "stream"])
    assert len(measurer.asked) == 1
    assert recorder.confirm(PROBLEM, "new") == SLOW, "measured anew"
    assert measurer.asked[-1] == (PROBLEM, "new", "confirm")
    assert recorded.read(path).get(PROBLEM, "new", is_confirmed=True) == SLOW
    assert recorded.read(path).get(PROBLEM, "new") == FAST
