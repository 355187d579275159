"""A random checkpoint is loaded in a fresh process; a load that fails is reported."""

import json

import torch

from fastshard import cli
from fastshard.bench import command, load, report
from fastshard.bench.case import Settings
from fastshard.bench.presets import PRESETS

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 300}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NO_LIMITS = {"read": [], "copy": []}


def test_a_load_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setitem(load.PRESETS, "qwen2.5-0.5b", PRESETS["qwen2.5-0.5b"] | TINY)
    settings = Settings(models=("qwen2.5-0.5b",), num_layers=2)
    (result,) = load.run(settings, device="cpu")
    assert (result["model"], result["layers"]) == ("qwen2.5-0.5b, 2 layers", [0, 1])
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 96) + (64 + 2 * 32) + 2 * 64
    assert result["weight_bytes"] == 2 * (2 * layer + 300 * 64 + 64)  # the head is the embedding
    assert result["allowed_bytes"] == 2 * 300 * 64 + 2**30
    assert result["host_peak_beyond_weights_bytes"] <= result["allowed_bytes"]
    assert result["seconds"] > 0


def test_a_process_that_fails_gives_its_reason(monkeypatch):
    monkeypatch.setattr(load, "CONFIG", load.CONFIG | TINY)
    monkeypatch.setattr(load, "GIB", 0.5)
    (result,) = load.run(Settings(num_layers=1), device="nowhere")
    assert result["model"] == "random, 0.5 GiB, 1 layers"
    assert "nowhere" in result["error"]
    line = load.text(result)
    assert line.startswith("load       fastshard            random, 0.5 GiB, 1 layers ")
    assert line.index(" none: ") + 1 == report.HEADER.index("dtype")


def test_text_of_a_load():
    result = {"model": "random, 4 GiB", "weight_bytes": 2**32, "seconds": 4.0}
    result |= {"device": "NVIDIA H200", "host_peak_beyond_weights_bytes": 2**30}
    line = load.text(result | {"allowed_bytes": 2**30})
    assert " ".join(line.split()).endswith(
        "random, 4 GiB 4.00 GiB of bfloat16 to NVIDIA H200 4.00 s 1.07 GB/s "
        "host peak beyond the weights 1024 MiB allowed 1024 MiB holds"
    )
    assert load.text(result | {"allowed_bytes": 2**29}).endswith(" BROKEN")


def test_the_stored_result_is_of_the_default_size():
    assert load.num_layers(load.GIB) == 9  # layers 0 to 8 in results/load_h200.json
    assert load.num_layers(0.1) == 1


def test_loads_are_kept_beside_starts(tmp_path, monkeypatch, capsys):
    limits = type("Limits", (), {"__init__": lambda *_: None, "describe": lambda _: NO_LIMITS})
    monkeypatch.setattr(command, "_current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(command, "Stopwatch", lambda *args, **keywords: None)
    monkeypatch.setattr(command, "Limits", limits)
    monkeypatch.setattr(command.report, "describe_environment", lambda device: {})
    monkeypatch.setattr(command.report, "introduction", lambda *args: [])
    monkeypatch.setattr(command.kernels, "describe", lambda *args: {"kernels": [], "missing": []})
    started = {"model": "m", "run": "first run", "seconds": 2.0, "code": "sm_86"}
    loaded = {"model": "m", "error": "no room"}
    monkeypatch.setattr(command.start, "run", lambda settings: iter([started]))
    monkeypatch.setattr(command.load, "run", lambda settings: iter([loaded]))
    path = tmp_path / "x.json"
    assert cli.main(["bench", "load", "start", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert (content["start"], content["load"]) == ([started], [loaded])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:2]] == ["start", "load"]
