"""The order of the rules, without processes: what is said of rules that cannot be applied."""

import pytest
import torch

from fastshard.archive import cases, compile, rules, sandbox, schema, trees, verdict
from fastshard.archive.foreign import Rejected
from fastshard.archive.rules import Truth
from fastshard.archive.trial import CLOCK_CALLS, CLOCK_ROUNDS, Seen, Settings, Trial

INFINITE = Truth([torch.full((2,), torch.inf)], [torch.ones(2, dtype=torch.float64)])
FINITE = Truth([torch.ones(2)], [torch.ones(2, dtype=torch.float64)])
OTHER = Truth([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)])


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """In the place of processes answers that a test names."""
    for name in ("_box", "_enter", "_open"):
        monkeypatch.setattr(Trial, name, lambda *arguments, **named: None)
    built = compile.Built(tmp_path / "x.so", None, tmp_path)
    made = Trial(Settings(torch.device("cpu"), parts=[]), None, built, built, "float32")
    made._inputs, made._can_scale = tmp_path, True
    return made


def notes_of(trial: Trial, shapes: list, answers: dict[str, Truth]) -> list[str]:
    trial._shapes = shapes
    trial._call = lambda kernel, shape, content, earlier: answers.get(content, OTHER)
    seen = Seen()
    trial.check(seen)
    return seen.notes


def test_what_could_be_tried_needs_no_note(trial):
    assert notes_of(trial, [[[2]], [[3]]], {"as published": FINITE}) == []


def test_what_could_not_be_tried_is_noted(trial):
    trial._can_scale = False
    assert notes_of(trial, [[[2], []]], {"as published": FINITE, "scaled": INFINITE}) == [
        "scaled, [2], []: the reference is nowhere finite: not compared",
        "no other shape was tried: the reference takes none",
        "no input was scaled or shifted: none is floating",
    ]


def test_there_is_something_to_compare():
    whole = torch.arange(2)
    assert rules.can_compare(FINITE)
    assert rules.can_compare(Truth([whole], [whole]))
    one_of_two = Truth([*INFINITE.eager, *FINITE.eager], [*INFINITE.golden, *FINITE.golden])
    assert rules.can_compare(one_of_two)
    assert not rules.can_compare(INFINITE)
    assert not rules.can_compare(Truth([torch.ones(2)], [torch.full((2,), torch.nan).double()]))


class Clock:
    """A process whose calls take ``us`` microseconds, in the ``delayed`` first rounds 50 times."""

    def __init__(self, us: float, delayed: int):
        self.us, self.delayed, self.calls = us, delayed, []

    def seconds(self, *, on_cpu, do, arguments, calls):
        assert (do, arguments) == ("clock", "path")
        self.calls.append(calls)
        slow = 50 if len(self.calls) <= self.delayed else 1
        return slow * self.us * calls / 1e6


def test_one_round_that_nothing_delays_is_enough(trial):
    trial._settings = Settings(torch.device("cuda"), parts=[])
    clock = Clock(us=10.0, delayed=40)
    trial._check_clock(clock, "path", 10.0)
    assert clock.calls == [CLOCK_CALLS["cuda"][1]] * 41


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_clock_outside_that_never_agrees_rejects(trial, device):
    trial._settings = Settings(torch.device(device), parts=[])
    clock = Clock(us=1000.0, delayed=0)
    with pytest.raises(Rejected) as caught:
        trial._check_clock(clock, "path", 1.0)
    assert caught.value.reason.verdict == verdict.TOO_FAST
    assert clock.calls == [CLOCK_CALLS[device][1]] * CLOCK_ROUNDS[device]


def test_the_rounds_of_a_slow_kernel_end(trial, monkeypatch):
    trial._settings = Settings(torch.device("cuda"), parts=[])
    monkeypatch.setattr("fastshard.archive.trial.CLOCK_PATIENCE", -1.0)
    clock = Clock(us=1e6, delayed=0)
    with pytest.raises(Rejected):
        trial._check_clock(clock, "path", 1e3)
    assert clock.calls == [CLOCK_CALLS["cuda"][0]]


def test_contents_come_in_order_and_of_other_shapes_once(trial):
    trial._shapes, asked = [[[2]], [[3]], [[4]]], []

    def call(kernel, shape, content, earlier):
        asked.append((shape, content, len(earlier)))
        return FINITE if content == "as published" else OTHER

    trial._call = call
    trial.check(Seen())
    published = [(0, content, i) for i, content in enumerate(cases.CONTENTS)]
    assert asked == [*published, (1, "as published", 0), (2, "as published", 0)]


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (verdict.WRONG, verdict.ONE_SHAPE, "as published, [3]: wrong: why"),
        (verdict.INACCURATE, verdict.INACCURATE, "as published, [3]: why"),
    ],
)
def test_what_is_wrong_at_another_shape_alone(trial, found, expected, text):
    """Less accuracy is no sign of it: PyTorch computes some shapes otherwise than others."""

    def call(kernel, shape, content, earlier):
        if shape == 1:
            raise Rejected(rules.Reason(found, "why"))
        return FINITE if content == "as published" else OTHER

    trial._shapes, trial._call = [[[2]], [[3]]], call
    with pytest.raises(Rejected) as rejected:
        trial.check(Seen())
    assert rejected.value.reason == rules.Reason(expected, text)


class Timed:
    """A kernel's process that says ``us`` a call, and answers as the reference."""

    def __init__(self, us: float):
        self.us = us

    def ask(self, **request):
        return {"us": self.us}

    def take(self, path, folder):
        return trees.pack(FINITE.eager)


def time_of(trial, monkeypatch, folder, us: float, flops: int) -> Seen:
    """Times a kernel of 8 bytes on a device that takes 1 us for them, and 1 us for 1000 FLOPs."""
    path = folder / "arguments"
    trees.save(path, trees.pack([torch.ones(2)]))
    trial._row, trial._truths, trial._own = schema.row_of({}, "a", "here"), [FINITE] * 4, folder
    box = sandbox.Sandbox(folder)
    monkeypatch.setattr(trial, "_box", lambda readable: box)
    monkeypatch.setattr(trial, "_enter", lambda box: Timed(us))
    monkeypatch.setattr(trial, "_make", lambda shape, content: path)
    monkeypatch.setattr(trial, "_check_clock", lambda *arguments: None)
    peers = {"us": {"eager": 9.0}, "notes": [], "flops": flops}
    monkeypatch.setattr(trial, "_ask_reference", lambda step, **request: peers)
    seen = Seen()
    trial.time(lambda: {"gbps": 0.008, "tflops": 0.001, "cache_bytes": 1000}, seen)
    return seen


def test_a_time_below_the_physical_limit_rejects(trial, monkeypatch, tmp_path):
    with pytest.raises(Rejected, match=r"^0\.9 us, less than the 1 us that the device takes at le"):
        time_of(trial, monkeypatch, tmp_path, us=0.9, flops=0)


def test_fewer_operations_than_the_reference_are_noted(trial, monkeypatch, tmp_path):
    seen = time_of(trial, monkeypatch, tmp_path, us=2.0, flops=1000)
    assert (seen.times, seen.notes) == ({"candidate": 2.0, "eager": 9.0}, [])
    seen = time_of(trial, monkeypatch, tmp_path, us=2.0, flops=3000)
    assert seen.notes == ["it must do fewer operations than the reference: less time than those"]
