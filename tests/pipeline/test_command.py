"""``generate`` under torchrun, and from a file: what rank 0 writes, and what the others do not."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_checkpoints import write_byte_checkpoint
from watched_ranks import WatchedRanks

import fastshard
from fastshard import arguments, cli, generate_command
from fastshard.checkpoint import Checkpoint
from fastshard.environment import LaunchedRank
from fastshard.pipeline import command

PROMPTS = ["ab", "cdefg", "h", "ij"]
SETTINGS = {"max_new_tokens": 7, "temperature": 1.2, "top_k": 60, "seed": 5}
WORDS = ["--max-new-tokens", "7", "--temperature", "1.2", "--top-k", "60", "--seed", "5"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_byte_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def expected(path):
    model = fastshard.load(path, device="cpu")
    return [
        "".join(model.stream(prompt, **SETTINGS | {"seed": 5 + i}))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS[:2], "", *PROMPTS[2:]]) + "\n")
    return file


def torchrun(size, path, *arguments):
    """(status, stdout, stderr) of ``generate`` on so many ranks, on this host's loopback."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    launch += ["--local-addr", "127.0.0.1"]
    command = [*launch, "-m", "fastshard", "generate", "--model", str(path), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=path,  # -m would take a checkout in the current folder
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def on_ranks(tmp_path):
    """As ``torchrun``, of ranks that no launcher started: (their statuses, stdouts, stderr)."""
    started = []

    def run(size, path, *arguments):
        words = ["generate", "--model", str(path), "--device", "cpu", *arguments]
        started.append(WatchedRanks(tmp_path, size, "command", words))
        return started[-1].exit_codes(), started[-1].printed(), "".join(started[-1].errors())

    yield run
    for ranks in started:
        ranks.__exit__()


def lines(texts):
    return [{"prompt": p, "text": text} for p, text in zip(PROMPTS, texts, strict=True)]


def test_one_prompt_by_hand_on_two_ranks(on_ranks, path, expected):
    statuses, printed, err = on_ranks(2, path, "ab", "--layers", "0,1-2", *WORDS)
    assert statuses == [0, 0], err
    assert printed == [expected[0] + "\n", ""]
    figures = r"2 prompt tokens in \d+\.\d\d s, 7 new tokens at [\d.]+ tokens/s"
    assert re.fullmatch(f"{figures}, 192 bytes a token over each of 1 hops\n", own_lines(err))


def own_lines(err):
    """What is not torchrun's own."""
    return "".join(line for line in err.splitlines(True) if "torch/distributed" not in line)


def test_a_file_of_prompts_on_three_ranks(path, expected, prompts_file):
    arguments = ["--prompts-file", str(prompts_file), "--in-flight", "2", *WORDS]
    status, out, err = torchrun(3, path, *arguments)
    assert status == 0, err
    assert [json.loads(line) for line in out.splitlines()] == lines(expected)
    figures = r"4 prompts of 10 tokens, 28 new tokens in \d+\.\d\d s at [\d.]+ tokens/s"
    assert re.fullmatch(f"{figures}, 192 bytes a token over each of 2 hops\n", own_lines(err))


def test_two_ranks_that_share_each_layer(on_ranks, path, expected):
    statuses, printed, err = on_ranks(2, path, "ab", "--tp", "2", *WORDS)
    assert statuses == [0, 0], err
    assert printed == [expected[0] + "\n", ""]
    figures = r"2 prompt tokens in \d+\.\d\d s, 7 new tokens at [\d.]+ tokens/s"
    assert re.fullmatch(f"{figures}\n", own_lines(err))


def test_what_cannot_be_is_an_error_of_every_rank(on_ranks, path):
    statuses, printed, err = on_ranks(2, path, "ab", "--shards", "2")
    assert (statuses, printed) == ([1, 1], ["", ""])
    message = "--shards cuts one process, with torchrun each rank is a shard: leave it out"
    assert err == f"fastshard: error: {message}\n"


@pytest.mark.parametrize(
    ("words", "lengths", "expected"),
    [
        ([], [5, 9], {"context": 9 + 20, "in_flight": 2, "mode": "auto", "layers": None}),
        ([], [5] * 9, {"context": 5 + 20, "in_flight": 6}),  # two for each of three ranks
        (["--in-flight", "4"], [5] * 9, {"in_flight": 4}),
        (["--in-flight", "4"], [5] * 2, {"in_flight": 2}),
        ([], [60], {"context": 64}),  # of the model
        (["--dtype", "bfloat16"], [5], {"dtype": torch.bfloat16}),
        (["--layers", "0,1,2"], [5], {"layers": (range(0, 1), range(1, 2), range(2, 3))}),
        (["--decode", "eager"], [5], {"mode": "eager"}),
        (["--prefill-chunk-size", "7"], [5], {"chunk_size": 7}),
    ],
)
def test_settings_of_three_ranks(path, monkeypatch, words, lengths, expected):
    monkeypatch.delenv("FASTSHARD_DECODE", raising=False)
    arguments = ["generate", "ab", "--max-new-tokens", "20", *words]
    args = cli.build_parser().parse_args(arguments)
    requests = [SimpleNamespace(prompt=[1] * length) for length in lengths]
    world = SimpleNamespace(num_stages=3, device=torch.device("cpu"))
    settings = command._settings(args, world, Checkpoint(path), requests)
    assert vars(settings) | expected == vars(settings)


class RecordedWatch:
    """In place of a ``Watch``: remembers the phases."""

    def __init__(self, store, rank, size, *, timeout):
        self.steps = self
        self.phases = []
        self.timeout = timeout
        self.num_issued = self.num_finished = self.num_moves = 0
        RecordedWatch.last = self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def begin(self, doing, **how):
        self.phases.append((doing, *how))

    def hold(self, layers):
        self.phases.append(layers)

    def issue(self):
        self.num_issued += 1

    def finish(self, event=None):
        self.num_finished += 1

    def advance(self):
        self.num_moves += 1


def test_the_watch_is_told_what_a_rank_is_at(run, monkeypatch):
    """Phases that may take any time are patient; commands count, and so does what is copied."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(generate_command, "launched_rank", lambda: LaunchedRank(0, 2, 0))
    monkeypatch.setattr(command, "torchrun_store", dist.HashStore)
    monkeypatch.setattr(command, "Watch", RecordedWatch)
    status, out, err = run("ab", "--max-new-tokens", "5", "--timeout", "70s")
    assert status == 0, err
    assert out
    watch = RecordedWatch.last
    assert watch.timeout == 70.0
    assert watch.phases == [
        ("opening the checkpoint", "is_patient"),
        ("comparing the ranks",),
        ("connecting",),
        ("reading the prompts", "is_patient"),
        ("agreeing on the settings",),
        ("meeting its neighbours",),
        ("agreeing on the layers",),
        range(3),
        ("finding its weights", "is_patient"),
        ("loading its weights",),
        ("preparing its graphs",),
        ("generating", "by_commands"),
        ("closing",),
    ]
    # A start, the prompt, a step for each of 4 more tokens, and the end.
    assert watch.num_issued == watch.num_finished == 7
    assert watch.num_moves > 10


@pytest.mark.parametrize("text", ["4.9", "4s", "0m", "soon", "inf"])
def test_a_timeout_too_short_to_end_in_is_refused(run, text):
    assert arguments.timeout("5") == arguments.timeout("5s") == 5
    assert arguments.timeout("10m") == 600
    status, _, err = run("ab", "--timeout", text)
    assert status == 2
    assert f"--timeout: must be a time of at least 5s, like 90s or 5m, got '{text}'" in err


# From a file, in one process.


@pytest.fixture
def run(capsys, path):
    def run(*arguments):
        capsys.readouterr()
        try:
            status = cli.main(["generate", "--model", str(path), "--device", "cpu", *arguments])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def test_one_process_cannot_share_layers(run):
    status, out, err = run("ab", "--tp", "2")
    assert (status, out) == (1, "")
    assert err == (
        "fastshard: error: --tp 2 shares layers over processes, and there is one: start it by "
        "torchrun --nproc-per-node 2 -m fastshard generate\n"
    )


@pytest.mark.parametrize("more", [[], ["--in-flight", "3"], ["--shards", "2"]])
def test_a_file_of_prompts_in_one_process(run, expected, prompts_file, more):
    status, out, err = run("--prompts-file", str(prompts_file), *WORDS, *more)
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == lines(expected)
    assert out.isascii() == "".join(expected).isascii()
    assert re.fullmatch(
        r"4 prompts of 10 tokens, 28 new tokens in \d+\.\d\d s at [\d.]+ tokens/s\n", err
    )


def test_a_file_of_one_prompt(run, expected, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ab")
    _, out, err = run("--prompts-file", str(file), *WORDS)
    assert json.loads(out) == {"prompt": "ab", "text": expected[0]}
    assert err.startswith("2 prompt tokens in ")


def test_a_file_of_json_strings(run, path, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a\\nb"\n\n""\n'.replace('""\n', '"c"\n'))
    _, out, _ = run("--prompts-file", str(file), "--max-new-tokens", "3")
    model = fastshard.load(path, device="cpu")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": prompt, "text": "".join(model.stream(prompt, max_new_tokens=3))}
        for prompt in ("a\nb", "c")
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", "\n\n", "none.txt: must hold at least one prompt, got none"),
        ("p.jsonl", '"a"\n5\n', "p.jsonl: line 2 must be a JSON string, got '5'"),
        ("p.jsonl", "a\n", "p.jsonl: line 1 must be a JSON string, got 'a'"),
    ],
)
def test_files_that_cannot_be_are_one_line(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    status, out, err = run("--prompts-file", str(tmp_path / name))
    assert (status, out) == (1, "")
    assert err.startswith("fastshard: error: ")
    assert err.endswith(f"{message}\n")
    assert err.count("\n") == 1


def test_a_file_or_a_prompt_not_both(run, prompts_file):
    status, out, err = run("ab", "--prompts-file", str(prompts_file))
    assert (status, out) == (2, "")
    assert "not allowed with argument" in err
