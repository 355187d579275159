"""The command line: what goes to stdout and stderr, exit statuses, and one-line errors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import (
    edit_tensors,
    make_reference,
    write_byte_checkpoint,
    write_tokenizer,
)

import fastshard
from fastshard import cli


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_byte_checkpoint(path, chat_template="{{ messages[0].content | upper }}:")
    return path


@pytest.fixture
def run(capsys, path):
    """Run ``fastshard generate`` on the small model in this process: (status, stdout, stderr)."""

    def run(*arguments, model=path):
        capsys.readouterr()
        try:
            status = cli.main(["generate", "--model", str(model), "--device", "cpu", *arguments])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def expected_text(path, prompt, **settings):
    return "".join(fastshard.load(path, device="cpu").stream(prompt, **settings)) + "\n"


def test_only_the_text_goes_to_stdout(run, path):
    status, out, err = run("ab", "--max-new-tokens", "12")
    assert status == 0
    assert out == expected_text(path, "ab", max_new_tokens=12)
    assert err.startswith("2 prompt tokens in ")
    assert " s, 12 new tokens at " in err
    assert err.endswith(" GB/s of weights\n")
    assert err.count("\n") == 1


def test_every_setting_arrives(run, path):
    arguments = (
        "--max-new-tokens 30 --temperature 1.3 --top-k 90 --top-p 0.97 --min-p 0.01 --seed 5"
    )
    settings = {
        "max_new_tokens": 30,
        "temperature": 1.3,
        "top_k": 90,
        "top_p": 0.97,
        "min_p": 0.01,
        "seed": 5,
    }
    expected = expected_text(path, "ab", **settings)
    assert run("ab", *arguments.split())[1] == expected
    stops = ["--stop", "nowhere", "--stop", expected[6:9]]
    assert run("ab", *arguments.split(), *stops)[1] == expected[:6] + "\n"


def test_each_setting_changes_the_text(run):
    base = ["ab", "--max-new-tokens", "30", "--temperature", "1.3"]
    text = run(*base)[1]
    for more in (["--top-k", "2"], ["--top-p", "0.1"], ["--min-p", "0.9"], ["--seed", "1"]):
        assert run(*base, *more)[1] != text, more


def test_chat_uses_the_template(run):
    assert run("ab", "--chat")[1] == run("AB:")[1] != run("ab")[1]


def test_decode_chooses_the_mode(run, monkeypatch):
    monkeypatch.setenv("FASTSHARD_DECODE", "eager")
    calls = []
    decode_step = fastshard.ops.decode_step
    monkeypatch.setattr(
        fastshard.ops,
        "decode_step",
        lambda *args, **keys: (calls.append(1), decode_step(*args, **keys))[1],
    )
    text = run("ab", "--max-new-tokens", "9")[1]
    assert calls == []
    assert run("ab", "--max-new-tokens", "9", "--decode", "persistent")[1] == text
    assert len(calls) == 8


def test_a_mode_that_cannot_run_is_one_line_of_warning(run):
    status, out, err = run("ab", "--decode", "graph")
    assert (status, out) == run("ab", "--decode", "eager")[:2]
    assert err.splitlines()[0] == (
        "fastshard: warning: decode mode graph is not possible, falling back to eager: "
        "a CUDA graph needs a GPU, got cpu"
    )
    assert err.count("\n") == 2  # and the figures


def test_an_unknown_mode_in_the_environment_is_one_line(run, monkeypatch):
    monkeypatch.setenv("FASTSHARD_DECODE", "fast")
    status, out, err = run("ab")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "error: FASTSHARD_DECODE must be one of auto, persistent, graph, eager, got" in err


def test_prompt_from_stdin(run, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert run("-")[1] == run("ab")[1]


@pytest.mark.parametrize(
    "cut", [["--shards", "2"], ["--shards", "3"], ["--layers", "0,1-2"], ["--layers", "0-2"]]
)
def test_shards_give_the_same_text(run, cut):
    assert run("ab", *cut)[1] == run("ab")[1]


def test_layers_are_the_shards(run, monkeypatch):
    from fastshard import loading

    spans = []
    load_weights = loading.load_weights

    def spy(targets, index, config, shard, report=None, **settings):
        spans.append((shard.start_layer, shard.end_layer))
        load_weights(targets, index, config, shard, report, **settings)

    monkeypatch.setattr(loading, "load_weights", spy)
    run("ab", "--layers", "0-1,2")
    run("ab", "--shards", "2")
    assert spans == [(0, 1), (2, 2)] * 2


def test_dtype_is_the_models(run, monkeypatch):
    from fastshard import loading

    dtypes = []
    check_fit = loading.check_fit
    monkeypatch.setattr(
        loading, "check_fit", lambda *args: (dtypes.append(args[3]), check_fit(*args))
    )
    run("ab")
    run("ab", "--dtype", "bfloat16")
    assert dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "0", "a"], "argument --shards: must be a positive integer, got '0'"),
        (["--shards", "x", "a"], "argument --shards: must be a positive integer, got 'x'"),
        (["--max-new-tokens", "-1", "a"], "argument --max-new-tokens: must be a positive integer"),
        (["--temperature", "nan", "a"], "argument --temperature: must be a finite number of at"),
        (["--temperature", "-1", "a"], "argument --temperature: must be a finite number of at"),
        (["--top-k", "1.5", "a"], "argument --top-k: must be an integer of at least 0, got '1.5'"),
        (["--layers", "0-", "a"], "argument --layers: must be ranges of layers with both ends"),
        (["--layers", "2-1", "a"], "argument --layers: must be ranges of layers with both ends"),
        (["--layers", "", "a"], "argument --layers: must be ranges of layers with both ends"),
        (["--shards", "2", "--layers", "0-2", "a"], "not allowed with argument"),
        (["--dtype", "int8", "a"], "argument --dtype: invalid choice: 'int8'"),
        (["--decode", "fast", "a"], "argument --decode: invalid choice: 'fast'"),
        ([], "one of the arguments PROMPT --prompts-file is required"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_wrong_command_lines_are_status_2_and_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "4", "a"], "shards must be 1 to the model's 3 layers, got 4"),
        (["--layers", "0-1", "a"], "layers must hold each of 0-2 once, in order, got 0-1"),
        (["--layers", "0-1,1-2", "a"], "layers must hold each of 0-2 once, in order, got 0-1,1-2"),
        (["--layers", "2,0-1", "a"], "layers must hold each of 0-2 once, in order, got 2-2,0-1"),
        (["--top-p", "0", "a"], "top_p must be in (0, 1], got 0.0"),
        (["--top-p", "2", "a"], "top_p must be in (0, 1], got 2.0"),
        (["--stop", "", "a"], "stop must be non-empty strings, got ['']"),
        (["a" * 64], "prompt must be shorter than the context of 64 tokens, got 64"),
        ([""], "prompt must have at least one token, got none"),
        (["--device", "cuda:99", "a"], "device cuda:99 is not there"),
        (["--device", "tpu", "a"], "tpu"),
    ],
)
def test_what_the_model_refuses_is_status_1_and_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("fastshard: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_there(run, tmp_path):
    status, _, err = run("a", model=tmp_path / "none")
    assert (status, err.count("\n")) == (1, 1)
    assert "source must be a directory or a hub id like owner/name, got" in err


def test_a_model_without_tokenizer_is_refused_before_its_weights_are_read(run, tmp_path):
    make_reference("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    status, _, err = run("a", model=tmp_path)
    assert (status, err) == (1, f"fastshard: error: {tmp_path}: tokenizer.json is missing\n")


def test_a_broken_checkpoint_is_one_line(run, tmp_path):
    make_reference("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", model__norm__weight=None)
    status, out, err = run("a", model=tmp_path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "model.safetensors: missing tensors model.norm.weight for layers 0-2" in err


def test_a_checkpoint_without_chat_template_is_one_line(run, tmp_path):
    make_reference("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    status, _, err = run("a", "--chat", model=tmp_path)
    assert status == 1
    assert err.endswith("error: chat needs a chat template, and the checkpoint has none\n")


def test_progress_of_all_shards_together(path):
    calls = []
    checkpoint = fastshard.checkpoint.Checkpoint(path)
    from fastshard.loading import load_chain

    load_chain(
        checkpoint,
        [range(0, 1), range(1, 3)],
        device="cpu",
        report=lambda done, total: calls.append((done, total)),
    )
    done = [count for count, _ in calls]
    loaded = fastshard.load(path, device="cpu")
    elements = sum(t.numel() for t in loaded.model.state_dict().values())
    assert {total for _, total in calls} == {elements}
    assert done == sorted(set(done))
    assert done[-1] == elements


def test_a_shard_without_layers_raises(path):
    from fastshard.loading import load_chain

    parts = [range(0, 3), range(3, 3)]
    with pytest.raises(ValueError, match=r"layers must hold each of 0-2 once, in .* 0-2,3-2"):
        load_chain(fastshard.checkpoint.Checkpoint(path), parts, device="cpu")


def test_info_prints_facts(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastshard"] == fastshard.__version__
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("fastshard ")


@pytest.mark.parametrize("arguments", [[], ["generat"], ["info", "--xml"]])
def test_unknown_commands_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_python_m_fastshard(tmp_path):
    command = [sys.executable, "-m", "fastshard", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == f"{fastshard.__version__}\n"


def test_a_reader_that_leaves_is_no_traceback(tmp_path, path):
    """Its end of the pipe is closed before the first piece of text."""
    command = [sys.executable, "-m", "fastshard", "generate", "--model", str(path)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*command, "--device", "cpu", "ab"],
        cwd=tmp_path,
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
