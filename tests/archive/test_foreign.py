"""A process that foreign code has taken over: what it says is a reason, and never an accident."""

import os

import pytest
import torch

from fastshard.archive import sandbox, trees, verdict
from fastshard.archive.foreign import Foreign, Rejected

BACKEND = """
import os, signal, sys, time

def answer(request):
    if request["do"] == "die":
        print("sandbox: cannot mount", file=sys.stderr, flush=True)
        os._exit(125)
    if request["do"] == "open":
        time.sleep(request["seconds"])
        yield {"failure": "OSError: no library"}
    yield {"begins": "call"}
    if request["do"] == "fail":
        yield {"failure": request["text"]}
    if request["do"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if request["do"] == "hang":
        time.sleep(1000)
    if request["do"] == "clock":
        begin = time.process_time()
        time.sleep(0.3)
        while time.process_time() < begin + request["works"]:
            pass
        yield {"ends": "clock"}
    yield {"a": 1}
    yield {"b": 2}
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "backend.py").write_text(BACKEND)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    limits = sandbox.Limits(resident_bytes=4 * sandbox.GIB)
    with (
        sandbox.temporary(limits, sandbox.allowed_parts(), [tmp_path]) as box,
        Foreign("backend:answer", box, timeout=20) as process,
    ):
        yield process


def reason(process: Foreign, **request) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        process.ask(**request)
    return caught.value.reason.verdict, caught.value.reason.text


def test_messages_come_as_one(process):
    assert process.ask(do="nothing") == {"begins": "call", "a": 1, "b": 2}


def test_failures_are_reasons(process):
    assert reason(process, do="fail", text="ValueError: x") == (verdict.REFUSED, "ValueError: x")
    text = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    assert reason(process, do="fail", text=text) == (verdict.CRASHED, text)
    said = "when it was called: the process ended by signal 9"
    assert reason(process, do="killed") == (verdict.CRASHED, said)
    assert process.ask(do="nothing")["a"] == 1, "another process answers"


def test_a_process_that_never_started_is_no_reason(process):
    with pytest.raises(
        RuntimeError, match=r"^the sandbox does not start: .*status 125: sandbox: c"
    ):
        process.ask(do="die")


def test_what_ran_cannot_play_the_sandbox(process):
    process.ask(do="nothing")
    said = "the process ended with status 125: sandbox: cannot mount"
    assert reason(process, do="die") == (verdict.CRASHED, said)
    assert process.errors == "sandbox: cannot mount\n"


def test_what_fails_before_a_kernel_is_loaded_is_no_reason(process):
    with pytest.raises(RuntimeError, match=r"^a kernel cannot be loaded here: OSError: no libra"):
        process.ask(do="open", seconds=0)


def test_setting_up_a_device_may_take_longer_than_a_call(process):
    process._timeout = 0.5
    with pytest.raises(RuntimeError, match=r"^a kernel cannot be loaded here: OSError: no libra"):
        process.ask(do="open", seconds=1.5)


def test_a_hang_is_a_reason(process):
    process._timeout = 1.0
    said = "when it was called: no answer for 1 s: killed"
    assert reason(process, do="hang") == (verdict.HUNG, said)


def test_seconds_are_those_between_its_messages(process):
    # Of the 0.3 s that it sleeps, some pass before its first message is read.
    assert 0.2 <= process.seconds(on_cpu=False, do="clock", works=0) < 60
    # On a CPU, what it waits for others is not its own: time is counted in hundredths.
    assert process.seconds(on_cpu=True, do="clock", works=0) < 0.2
    assert 0.38 <= process.seconds(on_cpu=True, do="clock", works=0.4) < 1
    with pytest.raises(Rejected, match=r"^when it was timed: it sent no end$"):
        process.seconds(on_cpu=False, do="nothing")


def test_an_answer_is_taken_once(process, tmp_path):
    made = process.box.scratch / "made"
    trees.save(made, trees.pack([torch.ones(3)]))
    (taken,) = process.take(made, tmp_path).value()
    assert taken.tolist() == [1, 1, 1]
    assert not made.exists()
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_text("x"), "taken is no file of arguments: "),
        (lambda path: path.symlink_to("/etc/passwd"), "made must be a file: "),
        (lambda path: None, "made must be a file: No such file"),
        (
            lambda path: trees.save(path, trees.pack([torch.ones(1).expand(10**12, 10**5)])),
            "a tensor of it is not contiguous",
        ),
    ],
)
def test_what_is_no_answer_is_a_reason(process, tmp_path, write, said):
    made = process.box.scratch / "made"
    write(made)
    with pytest.raises(Rejected, match=rf"^its answer was not written: {said}"):
        process.take(made, tmp_path)
