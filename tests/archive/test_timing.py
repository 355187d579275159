"""What a timed function is given, and what is kept of its answers."""

import pytest
import torch

from fastshard.archive import timing, trees
from fastshard.archive.timing import FreshCalls, HostClock

CPU = torch.device("cpu")
CONTENTS = [trees.pack((torch.full((3, 4), float(i + 1)), torch.arange(4), 7)) for i in range(3)]


class Recorder:
    """A function that keeps what it was given."""

    def __init__(self):
        self.given: list[tuple] = []
        self.addresses: set[int] = set()

    def __call__(self, x, index, number):
        assert (index.tolist(), number) == ([0, 1, 2, 3], 7)
        self.given.append(tuple(x.view(-1).tolist()))
        self.addresses.add(x.data_ptr())
        return x + 1, [x * 2]


def run_rounds(known: dict[int, int], rounds: int) -> tuple[FreshCalls, Recorder]:
    recorder = Recorder()
    run = FreshCalls(recorder, CONTENTS, CPU, known)
    for _ in range(rounds):
        run.prepare()
        run()
    run.keep()
    return run, recorder


def test_no_round_repeats_another_at_the_same_addresses():
    _, recorder = run_rounds({}, rounds=24)
    assert len(recorder.addresses) == timing.SETS
    rounds = [recorder.given[i :: timing.SETS] for i in range(timing.SETS)]
    assert all(len(set(values)) == 24 for values in rounds)
    assert not {(float(i + 1),) * 12 for i in range(3)} & set(recorder.given)


def test_known_rounds_have_their_content_and_their_answers_are_kept():
    run, recorder = run_rounds({2: 1, 6: 0, 9: 2}, rounds=10)
    for number, content in ((2, 1), (6, 0), (9, 2)):
        given = recorder.given[number * timing.SETS : (number + 1) * timing.SETS]
        assert set(given) == {(content + 1.0,) * 12}
        first, second = run.answers[content]
        assert torch.equal(first, torch.full((3, 4), content + 2.0))
        assert torch.equal(second, torch.full((3, 4), 2 * (content + 1.0)))


def test_a_kept_answer_is_a_copy():
    out = torch.zeros(2)
    run = FreshCalls(lambda *arguments: out.add_(1), CONTENTS, CPU, {0: 0})
    for _ in range(3):
        run.prepare()
        run()
    assert run.answers[0][0].tolist() == [timing.SETS] * 2


def test_large_inputs_have_one_set(monkeypatch):
    monkeypatch.setattr(timing, "LARGE_BYTES", 12 * 4 + 4 * 8)
    assert FreshCalls(Recorder(), CONTENTS, CPU, {}).calls == 1


def test_floats_in_half_precision_change_too():
    contents = [trees.pack((torch.full((2,), 3.0, dtype=torch.float16),))]
    given = []
    run = FreshCalls(lambda x: given.append(x.tolist()), contents, CPU, {})
    for _ in range(8):
        run.prepare()
        run()
    assert len({tuple(x) for x in given}) == 8 * timing.SETS


def test_all_are_timed_in_turn():
    order = []
    runs = {
        name: FreshCalls(lambda *arguments, n=name: order.append(n), CONTENTS, CPU, {})
        for name in "ab"
    }
    found = HostClock().measure(runs, rounds=3)
    per_run = ["a"] * timing.SETS, ["b"] * timing.SETS
    assert order == [*per_run[0], *per_run[1]] * 4  # one round warms up
    assert [found[name].n for name in "ab"] == [3, 3]
    assert all(found[name].us > 0 for name in "ab")


def test_a_time_is_that_of_one_call(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    run = FreshCalls(Recorder(), CONTENTS, CPU, {})
    assert HostClock().measure({"a": run}, rounds=3)["a"].us == 1e6 / timing.SETS


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
def test_what_a_device_can_do(device):
    (found,) = timing.rates({"device": str(device)})
    assert set(found) == {"gbps", "tflops", "cache_bytes"}
    assert 0.1 < found["gbps"] < 1e5
    assert 1e-4 < found["tflops"] < 1e4
