"""Libraries generate with and without their adapter, in a process of its own and in this one."""

import sys

import pytest
import torch

from fastshard.bench import adapters, report
from fastshard.bench.case import Settings
from fastshard.bench.presets import PRESETS

TINY = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TINY |= {"max_position_embeddings": 512}
CONFIG = PRESETS["llama-3.2-1b"] | TINY


@pytest.mark.parametrize("library", adapters.LIBRARIES)
def test_measures_both_models(library, monkeypatch):
    monkeypatch.setattr(adapters, "NEW_TOKENS", 5)
    monkeypatch.setattr(adapters, "ROUNDS", 2)
    result = adapters.measure(library, CONFIG, "cpu", torch.float32)
    assert (result["dtype"], result["new_tokens"], result["same_tokens"]) == ("float32", 5, 5)
    assert set(result["versions"]) == {"fastshard", "torch", library}
    for name in ("untouched", "accelerated"):
        found = result[name]
        assert found["n"] == 2
        assert found["p20"] <= found["us"] <= found["p80"]
        assert 0 < found["relative_error"] < 1e-5


def test_an_adapter_that_errs_is_broken(monkeypatch):
    from fastshard.integrations import transformers

    def spoil(model):
        model.model.norm.weight.data.mul_(1.1)
        return model

    monkeypatch.setattr(transformers, "accelerate", spoil)
    monkeypatch.setattr(adapters, "NEW_TOKENS", 3)
    monkeypatch.setattr(adapters, "ROUNDS", 1)
    result = adapters.measure("transformers", CONFIG, "cpu", torch.bfloat16)
    assert 0.05 < result["accelerated"]["relative_error"] < 0.15
    assert "BROKEN" in adapters.text({"library": "transformers", "model": "m"} | result)


def test_text():
    times = {"p20": 900.0, "p80": 1250.0, "n": 7}
    result = {"library": "transformers", "model": "m", "dtype": "bfloat16", "same_tokens": 60}
    result |= {"untouched": times | {"us": 10_000.0, "relative_error": 1e-2}}
    result |= {"accelerated": times | {"us": 1_000.0, "relative_error": 2e-2}}
    line = adapters.text(result)
    assert line.index("bfloat16") == report.HEADER.index("dtype")
    assert " ".join(line.split()) == (
        "adapters transformers m bfloat16 100.0 tokens/s untouched, 1000.0 accelerated, 10.00x; "
        "p20-p80 0.900-1.250 ms a token; error 2.0e-02 (1.0e-02), 60 of 65 tokens the same"
    )
    result["accelerated"]["relative_error"] = 2.1e-2
    assert " error 2.1e-02 (1.0e-02) BROKEN, " in adapters.text(result)


def test_every_library_and_model_has_a_process(monkeypatch):
    commands = []

    def result_of(command, timeout):
        commands.append(command)
        return {"error": "no room"}

    monkeypatch.setattr(adapters.processes, "result_of", result_of)
    settings = Settings(models=("mistral-7b",), num_layers=3, dtype=torch.float16)
    results = list(adapters.run(settings))
    program = [sys.executable, adapters.__file__]
    rest = ["--model", "mistral-7b", "--device", "cuda", "--dtype", "float16", "--layers", "3"]
    assert commands == [[*program, name, *rest] for name in ("transformers", "torchtune")]
    assert [adapters.text(result).split()[1:] for result in results] == [
        [name, "mistral-7b", "none:", "no", "room"] for name in ("transformers", "torchtune")
    ]


def test_a_process_that_fails_gives_its_reason():
    command = [sys.executable, adapters.__file__, "torchtune", "--device", "nowhere"]
    result = adapters.processes.result_of(command, adapters.TIMEOUT)
    assert "nowhere" in result["error"]
