"""Judging what was seen, and the measuring process: crashes, hangs, wrong answers."""

import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastshard.ops.variants import key_shape
from fastshard.tune import inputs, nvcc, observe
from fastshard.tune import worker as worker_module
from fastshard.tune.compiler import Compiler, CompilingMeasurer
from fastshard.tune.measure import Asker, GpuMeasurer, Observation, judge
from fastshard.tune.problem import AUTO, Problem
from fastshard.tune.worker import Worker, WorkerFailed, WorkerHung
from helpers import CUDA_ONLY

ROOT = Path(__file__).parents[2]
GOOD = {
    "errors": [[1e-3, 1e-3], [2e-3, 1e-3]],
    "timing": (8.0, 7.9, 8.2),
    "auto_us": 10.0,
    "limit_us": 5.0,
}


def test_a_good_variant_may_be_chosen():
    found = judge(Observation(**GOOD), seconds=0.5)
    assert (found.us, found.p20, found.p80, found.auto_us) == (8.0, 7.9, 8.2, 10.0)
    assert (found.error, found.reason, found.seconds, found.ratio) == (2e-3, None, 0.5, 0.8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"failure": "no variant 3x3"}, "no variant 3x3"),
        ({"errors": [[1e-3, 1e-3], [2.1e-3, 1e-3]]}, "error 2.1e-03, eager 1.0e-03"),
        ({"errors": [[None, 1e-3]]}, "error not finite"),
        ({"errors": []}, "not timed"),
        ({"timing": None}, "not timed"),
        ({"limit_us": 8.5}, "less than the 8.50 us that the device takes at least"),
        ({"preparation_us": 4e4}, "prepares 40 ms for each new shape, won back in 20000 calls"),
        ({"preparation_us": 4e4, "timing": (10.5, 10, 11)}, "prepares 40 ms .*never won"),
    ],
)
def test_a_bad_one_may_not(change, reason):
    found = judge(Observation(**GOOD | change), seconds=0.5)
    assert found.us is None
    assert found.ratio == math.inf
    assert re.search(reason, found.reason), found.reason


@pytest.mark.parametrize(
    "change", [{"limit_us": 8.4}, {"preparation_us": 1999.0}, {"preparation_us": 127.0}]
)
def test_noise_and_what_pays_are_allowed(change):
    assert judge(Observation(**GOOD | change), seconds=0.5).us == 8.0


def test_preparation_that_pays():
    seen = GOOD | {"auto_us": 1000.0, "preparation_us": 4e4}
    assert judge(Observation(**seen), seconds=0.5).reason is None


@pytest.mark.parametrize(
    ("problem", "shapes"),
    [
        (Problem("rms_norm", "float16", (2048, 64)), [(2047, 64), (1025, 64)]),
        (Problem("rms_norm", "float16", (1, 64)), [(1, 64), (1, 64)]),
        (
            Problem("attention", "float16", (2, 512, 512, 4, 2, 64)),
            [(2, 511, 511, 4, 2, 64), (2, 257, 257, 4, 2, 64)],
        ),
        (
            Problem("cached_attention", "float16", (8, 1, 4096, 4, 2, 64)),
            [(8, 1, 4095, 4, 2, 64), (8, 1, 2049, 4, 2, 64)],
        ),
    ],
)
def test_neighbours_share_the_entry(problem, shapes):
    found = observe.neighbours(problem)
    assert [each.shape for each in found] == shapes
    for each in found:
        assert key_shape(each.op, each.shape) == key_shape(problem.op, problem.shape)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_what_is_left_unwritten_is_seen_where_no_sample_is(op):
    made = inputs.make(Problem(op, "float16", (500, 8)), torch.device("cpu"), 1, 0)
    outputs = made.call(0, AUTO)
    assert torch.equal(observe.sampled(made, outputs), made.sample(outputs).double())
    last = outputs if op == "rms_norm" else outputs[1]
    last[1, 3] = math.nan
    assert made.sample(outputs).isfinite().all()
    assert observe.sampled(made, outputs).isnan().all()


BACKEND = """
import os, signal, sys, time

def answer(request):
    print("a library talks")
    for name in ["auto", *request["variants"]]:
        yield {"begins": name}
        if name == "crash":
            os._exit(3)
        if name == "segfault":
            print("about to fail", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "hang":
            time.sleep(1000)
        if name == "raise":
            yield {"variant": name, "failure": "no such variant"}
            continue
        error = 1.0 if name == "wrong" else 1e-3
        yield {"variant": name, "errors": [[error, 1e-3]], "preparation_us": 0.0}
    if request["variants"] == ["alone"] or "late" not in request["variants"]:
        names = ["auto", *(v for v in request["variants"] if v not in ("raise", "wrong"))]
        yield {"begins": "timing"}
        yield {"timings": {n: [10.0 if n == "auto" else 8.0, 7, 9] for n in names},
               "limit_us": 1.0}
    else:
        yield {"begins": "timing"}
        os._exit(4)

def pid(request):
    yield {"pid": os.getpid(), "seed": request["seed"]}

def libraries(request):
    yield {"begins": "auto"}
    for name in request["variants"]:
        yield {"variant": name, "failure": str(request["libraries"].get(name))}

def counts(request):
    for number in range(3):
        yield {"number": number, "of": request["of"]}

def deaf(request):
    os.closerange(3, 100)  # its messages end, and it does not
    time.sleep(1000)
    yield

def speaks(request):  # over the channel of messages, whichever number it has
    for number in range(3, 100):
        try:
            os.write(number, bytes.fromhex(request["hex"]))
        except OSError:
            pass
    time.sleep(1000)
    yield

def interrupted(request):
    raise ValueError("broken")
    yield
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "backend.py").write_text(textwrap.dedent(BACKEND))
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture
def asker(environment):
    asker = Asker("backend:answer", seed=0, timeout=20, environment=environment)
    yield asker
    asker.close()


PROBLEM = Problem("rms_norm", "float16", (1, 64))


def test_an_answer(asker):
    good, raises, wrong = asker(PROBLEM, ["good", "raise", "wrong"])
    assert (good.us, good.auto_us, good.reason) == (8.0, 10.0, None)
    assert raises.reason == "no such variant"
    assert wrong.reason.startswith("error 1.0e+00")


def test_the_process_is_told_where_libraries_are(environment):
    def library(problem, variant):
        return Path("/a.so") if (problem, variant) == (PROBLEM, "96x3") else None

    asker = Asker("backend:libraries", seed=0, timeout=20, environment=environment, library=library)
    found = asker(PROBLEM, ["96x3", "64x2"])
    assert [each.reason for each in found] == ["/a.so", "None"]
    assert asker.confirm(PROBLEM, "96x3").reason == "/a.so"
    asker.close()


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("crash", "the process ended with status 3: a library talks"),
        ("segfault", "the process ended by signal 11: about to fail"),
    ],
)
def test_a_crash_is_recorded_and_the_others_go_on(asker, variant, reason):
    first, bad, last = asker(PROBLEM, ["first", variant, "last"])
    assert (first.us, last.us) == (8.0, 8.0)
    assert (bad.us, bad.reason) == (None, reason)
    assert asker(PROBLEM, ["next"])[0].us == 8.0


def test_a_hang_is_killed(environment):
    asker = Asker("backend:answer", seed=0, timeout=15, environment=environment)
    hang, other = asker(PROBLEM, ["hang", "other"])
    assert hang.reason == "no answer for 15 s: killed"
    assert other.us == 8.0
    asker.close()


def test_a_crash_while_all_are_timed_is_sought_alone(asker):
    late, good = asker(PROBLEM, ["late", "good"])
    assert late.reason.startswith("the process ended with status 4")
    assert good.us == 8.0


def test_a_process_that_cannot_start_is_a_reason(environment):
    asker = Asker("backend:nothing", seed=0, timeout=20, environment=environment)
    found = asker(PROBLEM, ["a", "b"])
    assert all("has no attribute 'nothing'" in each.reason for each in found)


def test_confirmations_come_from_a_fresh_process_and_other_inputs(environment):
    worker = Worker("backend:pid", timeout=20, environment=environment)
    (first,) = worker.ask({"seed": 1})
    (second,) = worker.ask({"seed": 2})
    assert first["pid"] == second["pid"] != os.getpid()
    worker.close()
    (third,) = worker.ask({"seed": 3})
    assert third["pid"] != first["pid"]
    worker.close()
    asker = Asker("backend:answer", seed=0, timeout=20, environment=environment)
    asker(PROBLEM, ["good"])
    before, seed = asker._worker._process, asker._seed
    assert asker.confirm(PROBLEM, "good").us == 8.0
    assert before.poll() is not None, "the searching process has ended"
    assert asker._fresh._process is not None
    assert asker._seed != seed
    asker.close()


def test_an_exception_ends_the_process_with_its_last_line(environment):
    worker = Worker("backend:interrupted", timeout=20, environment=environment)
    with pytest.raises(WorkerFailed, match="status 1: ValueError: broken"):
        list(worker.ask({}))


def test_a_process_that_ends_its_messages_but_not_itself_is_killed(environment, monkeypatch):
    monkeypatch.setattr(worker_module, "END_TIMEOUT", 1.0)
    worker = Worker("backend:deaf", timeout=20, environment=environment)
    with pytest.raises(WorkerFailed, match="ended by signal 9"):
        list(worker.ask({}))


def test_a_slow_start_is_no_hang(environment, tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(3); from backend import counts")
    worker = Worker("slow:counts", timeout=1.5, environment=environment)
    assert len(list(worker.ask({"of": 1}))) == 3
    worker.close()


def test_an_answer_that_nobody_waits_for_is_not_the_next_one(environment):
    worker = Worker("backend:counts", timeout=20, environment=environment)
    answer = worker.ask({"of": 1})
    assert next(answer) == {"number": 0, "of": 1}
    answer.close()
    assert [message["of"] for message in worker.ask({"of": 2})] == [2, 2, 2]
    worker.close()


def test_a_process_that_ends_between_requests_is_replaced(environment):
    worker = Worker("backend:pid", timeout=20, environment=environment)
    (first,) = worker.ask({"seed": 1})
    worker._process.kill()
    worker._process.wait()
    (second,) = worker.ask({"seed": 2})
    assert second["pid"] != first["pid"]
    worker.close()


def test_a_process_that_takes_no_request_is_a_failure(environment, monkeypatch):
    worker = Worker("backend:pid", timeout=20, environment=environment)
    list(worker.ask({"seed": 1}))
    worker._process.kill()
    worker._process.wait()
    # As if it ended while the request was written.
    monkeypatch.setattr(worker._process, "poll", lambda: None)
    with pytest.raises(WorkerFailed, match="ended by signal 9"):
        list(worker.ask({"seed": 2}))
    assert list(worker.ask({"seed": 3}))
    worker.close()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"tune measures on a GPU, .* --replay --study FILE"):
        GpuMeasurer()


@CUDA_ONLY
def test_memory_is_poisoned(device):
    for size in (100, 5000, 300_000, 3_000_000, 30_000_000):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            observe.poison(device)
            assert torch.empty(size, dtype=dtype, device=device).isnan().all()


@CUDA_ONLY
@pytest.mark.parametrize("size", [100, 2000, 300_000, 600_000, 6_000_000])
def test_memory_between_tensors_is_poisoned(device, size):
    tensors = [torch.ones(size, device=device) for _ in range(40)]
    living = tensors[::2]
    del tensors
    observe.poison(device)
    between = [torch.empty(size, device=device) for _ in range(20)]
    assert all(out.isnan().all() for out in between)
    assert all((tensor == 1).all() for tensor in living)


SMALL = [
    (Problem("rms_norm", "bfloat16", (64, 4096)), ["128x4", "512x1", "64x2"]),
    (Problem("fused_mlp", "bfloat16", (64, 512, 1024)), ["library", "tiles_64x128"]),
    (Problem("linear", "float16", (4, 512, 1024)), ["library"]),
    (Problem("attention", "float16", (1, 256, 256, 8, 2, 64)), ["small", "prefill", "decode"]),
    (Problem("cached_attention", "float16", (2, 1, 512, 8, 2, 64)), ["decode/2", "few", "small/4"]),
]


@CUDA_ONLY
def test_measures(device):
    with GpuMeasurer() as measurer:
        assert measurer.device == torch.cuda.get_device_name(device)
        for problem, variants in SMALL:
            for variant, found in zip(variants, measurer(problem, variants), strict=True):
                if variant in ("64x2", "decode"):
                    assert found.us is None
                    assert "64x2 holds rows" in found.reason or "decode takes" in found.reason
                else:
                    assert found.reason is None
                    assert found.limit_us * 0.95 <= found.us
                    assert found.p20 <= found.us <= found.p80
                    assert found.auto_us > 0
                    assert 0 < found.error < 1e-2
        again = measurer.confirm(problem, variants[0])
        assert again.reason is None


@CUDA_ONLY
def test_a_wrong_kernel_is_found(device, monkeypatch):
    """Whose last row is never written, and was right in the memory of the call before."""
    problem = Problem("linear", "float16", (4, 512, 1024))
    real = observe.inputs.make

    def make(*args):
        made = real(*args)

        def call(i, variant):
            out = made.call(i, variant)
            if variant != "library":
                return out
            wrong = torch.empty_like(out)
            wrong[:-1] = out[:-1]
            return wrong

        return type(made)(**{**vars(made), "call": call})

    monkeypatch.setattr(observe.inputs, "make", make)
    request = {"op": problem.op, "dtype": problem.dtype, "shape": problem.shape, "seed": 0}
    request["libraries"] = {}
    seen = list(observe.observe(request | {"variants": ["library"]}))
    errors = {m["variant"]: m["errors"] for m in seen if "errors" in m}
    assert all(pair[0] is None for pair in errors["library"])
    assert all(pair[0] <= 2 * pair[1] for pair in errors[AUTO])
    assert list(seen[-1]["timings"]) == [AUTO]


@CUDA_ONLY
@pytest.mark.skipif(not nvcc.has_nvcc(nvcc.find_cuda_home()), reason="there is no nvcc")
def test_measures_what_is_not_in_the_menu(device, tmp_path):
    compiler = Compiler(ROOT, tmp_path)
    problems = [
        (Problem("rms_norm", "bfloat16", (64, 4096)), ["320x2", "128x4"]),
        (Problem("fused_mlp", "bfloat16", (64, 512, 1024)), ["tiles_64x64_32x4_2x2", "tiles"]),
    ]
    with GpuMeasurer(library=compiler.library) as gpu:
        measurer = CompilingMeasurer(gpu, compiler)
        for problem, variants in problems:
            for found in measurer(problem, variants):
                assert found.reason is None
                assert found.us > 0
            assert measurer.confirm(problem, variants[0]).reason is None


@CUDA_ONLY
def test_a_library_that_is_none_is_a_reason(device, tmp_path):
    (tmp_path / "a.so").write_text("no library")
    with GpuMeasurer(library=lambda problem, variant: tmp_path / "a.so") as gpu:
        (found,) = gpu(Problem("rms_norm", "bfloat16", (4, 64)), ["96x3"])
    assert "a.so" in found.reason


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"no message\n", r"'no message\\n'"),
        (b"[1]\n", r"'\[1\]\\n'"),
        (b"\xff\xfe\n", "'\ufffd\ufffd\\\\n'"),
        (b"[" * 60_000 + b"\n", r"'\[{80}'"),
    ],
)
def test_what_is_no_message_is_a_failure(environment, said, shown):
    worker = Worker("backend:speaks", timeout=20, environment=environment)
    with pytest.raises(WorkerFailed, match=rf"^it answered what is no message: {shown}$"):
        list(worker.ask({"hex": said.hex()}))
    assert worker._process is None


def test_a_message_without_end_is_read_no_further(environment, monkeypatch):
    monkeypatch.setattr(worker_module, "LONGEST_LINE", 100)
    worker = Worker("backend:speaks", timeout=20, environment=environment)
    with pytest.raises(WorkerFailed, match=r"^it answered what is no message: 'x{80}'$"):
        list(worker.ask({"hex": (b"x" * 1000).hex()}))


def test_the_process_is_started_as_asked(environment):
    started = []

    def start(command, **pipes):
        started.append(command)
        return subprocess.Popen(command, env=environment, **pipes)

    worker = Worker("backend:pid", timeout=20, start=start)
    (answer,) = worker.ask({"seed": 1})
    assert answer["pid"] == worker._process.pid
    assert [command[-1] for command in started] == ["backend:pid"]
    worker.close()


def test_a_hang_is_told_from_a_crash(environment):
    worker = Worker("backend:speaks", timeout=2, environment=environment)
    with pytest.raises(WorkerHung, match=r"^no answer for 2 s: killed$"):
        list(worker.ask({"hex": ""}))
