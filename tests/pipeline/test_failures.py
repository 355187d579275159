"""``torchrun -m fastshard generate`` whose ranks die, hang or raise: message, status, no orphans.

Real launchers, but where a fault is there from the start. What happens in the middle of a run
happens once text has come.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    SIZES,
    edit_tensors,
    make_reference,
    write_tokenizer,
)
from watched_ranks import WatchedRanks

from fastshard.dist.rank_record import Process
from helpers import CUDA_ONLY, check_place

SLACK = 60  # seconds; for a busy machine
MARK = "FASTSHARD_TEST_RUN"
FAULTY_RANK = Path(__file__).parents[1] / "faulty_rank.py"
DIED = r"its process \(pid \d+ on \S+\) died without a word: killed, or it crashed"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vocab_size", 258)
        patch.setitem(SIZES, "max_position_embeddings", 4096)
        make_reference("llama").save_pretrained(path)
    write_tokenizer(path)
    (path / "generation_config.json").write_text('{"eos_token_id": []}')  # no text ends early
    return path


class Run:
    """A launcher with its ranks."""

    def __init__(self, size, path, *arguments, fault=None, device="cpu"):
        self.mark = uuid.uuid4().hex
        what = ["-m", "fastshard"] if fault is None else [FAULTY_RANK, *fault]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        launcher += ["--local-addr", "127.0.0.1"]  # no name has to be looked up
        generate = ["generate", "--model", path, "--device", device, "--max-new-tokens", "4000"]
        self.launcher = subprocess.Popen(
            [sys.executable, *launcher, *what, *generate, *arguments, "ab"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
        )
        self.begin = time.monotonic()

    def wait_for_text(self):
        """Until the run is in the middle of its work."""
        assert self.launcher.stdout.read(1), self.launcher.stderr.read().decode()
        self.begin = time.monotonic()

    def end(self):
        """Exit status, the lines of fastshard, stderr; all processes have ended."""
        _, err = self.launcher.communicate(timeout=600)
        self.seconds = time.monotonic() - self.begin
        err = err.decode()
        # The launcher waits for its ranks: none may be left, not even for a moment.
        assert self.pids() == {}, err
        lines = [line for line in err.splitlines() if line.startswith("fastshard: ")]
        return self.launcher.returncode, lines, err

    def pids(self):
        """Rank -> process id of what still runs, the launcher being None."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().decode().split("\0")
            except OSError:  # of another user, or it has just ended
                continue
            if f"{MARK}={self.mark}" in words:
                variables = dict(word.split("=", 1) for word in words if "=" in word)
                found[int(variables["RANK"]) if "RANK" in variables else None] = int(process.name)
        return found

    def kill(self):
        for pid in self.pids().values():
            os.kill(pid, signal.SIGKILL)
        self.launcher.communicate()


@pytest.fixture
def run(path):
    started = []

    def run(size, *arguments, **settings):
        started.append(Run(size, path, *arguments, **settings))
        return started[-1]

    yield run
    for each in started:
        each.kill()


@pytest.mark.parametrize(("rank", "layers"), [(0, "0-0"), (1, "1-1")])
def test_a_killed_rank_is_named_at_once(run, rank, layers):
    """Long before the timeout, which is for ranks that hang."""
    ranks = run(3, "--timeout", "30m")
    ranks.wait_for_text()
    pid = ranks.pids()[rank]
    os.kill(pid, signal.SIGKILL)
    status, (line,), _ = ranks.end()
    assert status == 1
    assert re.fullmatch(rf"fastshard: error: rank {rank} \(layers {layers}\): {DIED}", line)
    assert f"(pid {pid} on " in line
    assert ranks.seconds < SLACK


@CUDA_ONLY
@pytest.mark.parametrize(("rank", "layers"), [(0, "0-0"), (1, "1-2")])
def test_a_killed_rank_of_two_gpus_is_named_at_once(run, device, rank, layers):
    """The other's GPU waits for it in a kernel of NCCL that never ends."""
    check_place("cuda")
    slow = ["--decode", "eager"]  # it is not to be through before the rank is killed
    ranks = run(2, "--timeout", "2m", "--layers", "0,1-2", *slow, device="cuda")
    ranks.wait_for_text()
    os.kill(ranks.pids()[rank], signal.SIGKILL)
    status, (line,), _ = ranks.end()
    assert status == 1
    assert re.fullmatch(rf"fastshard: error: rank {rank} \(layers {layers}\): {DIED}", line)
    assert ranks.seconds < SLACK


def test_a_stopped_rank_ends_the_run_within_the_timeout(run):
    ranks = run(2, "--timeout", "16s", "--layers", "0,1-2")
    ranks.wait_for_text()
    pid = ranks.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    status, (line,), _ = ranks.end()
    assert status == 1
    assert re.fullmatch(
        r"fastshard: error: rank 1 \(layers 1-2\): no sign of life for \d+ s while [a-z ]+ "
        rf"\(pid {pid} on \S+, which is stopped\)",
        line,
    )
    assert ranks.seconds < 16 + SLACK


def test_a_stuck_rank_ends_the_run_within_the_timeout(run):
    ranks = run(2, "--timeout", "16s", "--layers", "0,1-2", fault=("stuck", "1"))
    ranks.wait_for_text()
    status, (line,), _ = ranks.end()
    assert status == 1
    assert re.fullmatch(
        r"fastshard: error: rank 1 \(layers 1-2\): no progress for 11 s while generating, "
        r"\d+ of \d+ commands finished, at \w+\.py:\d+ in \w+",
        line,
    )
    assert ranks.seconds < 16 + SLACK


def test_a_rank_without_memory_is_named(run):
    message = "cannot allocate 2 GiB"
    ranks = run(2, "--timeout", "30m", "--layers", "0,1-2", fault=("memory-running", "1"))
    status, lines, err = ranks.end()
    assert status == 1
    assert lines == [f"fastshard: error: rank 1 (layers 1-2): {message}"]
    # The launcher's report, the last thing on a terminal, has it too.
    assert f"traceback : rank 1 (layers 1-2): {message}" in err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "memory-loading",
            r"rank 1 \(layers 1-2\): CUDA out of memory\. Tried to allocate 2\.00 GiB\.",
        ),
        (
            "version",
            r"all ranks must have the same fastshard version, got \S+ on rank 0, 0\.0\.1 on rank 1",
        ),
        (
            "checkpoint",
            r"all ranks must have the same tensor model\.layers\.1\.mlp\.up_proj\.weight, got "
            r"\[80, 48\] torch\.float32, 15360 bytes, sample \w{8} on rank 0, "
            r"\[81, 48\] torch\.float32, 15552 bytes, sample \w{8} on rank 1",
        ),
        (
            "finetuned checkpoint",
            r"all ranks must have the same tensor model\.layers\.1\.mlp\.up_proj\.weight, got "
            r"\[80, 48\] torch\.float32, 15360 bytes, sample (\w{8}) on rank 0, "
            r"\[80, 48\] torch\.float32, 15360 bytes, sample (?!\1)\w{8} on rank 1",
        ),
        (
            "option",
            "all ranks must have the same option --dtype, got None on rank 0, bfloat16 on rank 1",
        ),
    ],
)
def test_a_fault_of_one_rank_is_there_from_the_start(path, tmp_path, fault, message):
    if fault.endswith("checkpoint"):
        shutil.copytree(path, f"{path}-changed", dirs_exist_ok=True)
        rows = 80 if fault.startswith("finetuned") else 81
        changed = {"model__layers__1__mlp__up_proj__weight": torch.zeros(rows, 48)}
        edit_tensors(Path(f"{path}-changed/model.safetensors"), **changed)
        fault = "checkpoint"
    words = ["generate", "--model", str(path), "--device", "cpu", "--layers", "0,1-2", "ab"]
    with WatchedRanks(tmp_path, 2, "command", words, fault) as ranks:
        assert ranks.exit_codes() == [1, 1]
        assert ranks.printed() == ["", ""]
        assert re.fullmatch(f"fastshard: error: {message}\n", ranks.message())


def test_ctrl_c_ends_all_quietly(run):
    """A terminal interrupts torchrun alone; it passes that on, and says so itself."""
    ranks = run(2)
    ranks.wait_for_text()
    processes = [Process.of(pid) for pid in ranks.pids().values()]
    assert len(processes) == 3
    ranks.launcher.send_signal(signal.SIGINT)
    status, lines, err = ranks.end()
    assert status != 0
    assert lines == []
    assert err.count("Traceback") == err.count("SignalException: Process") == 1
    assert all(process.is_gone() for process in processes)
    assert ranks.seconds < SLACK
