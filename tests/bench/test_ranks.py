"""A model over several ranks and on one: what is measured, and what is said of it."""

import re
import sys

import pytest
import torch

from fastshard import ModelConfig
from fastshard.bench import measured_rank, processes, ranks, report
from fastshard.bench.case import Settings
from fastshard.bench.presets import PRESETS

TINY = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 300}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TINY |= {"max_position_embeddings": 512}


def test_measures_every_way_to_cut(monkeypatch):
    monkeypatch.setenv("FASTSHARD_DECODE", "eager")
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["llama-3.2-1b"] | TINY)
    settings = Settings(models=("tiny",), dtype=torch.float32, ranks=(2,))
    words = ["--new-tokens", "25", "--rounds", "2"]
    one, pipeline, tp = ranks.run(settings, "cpu", words=words)
    assert "error" not in one, one
    assert (one["ranks"], one["tp"], one["hops"], one["hop_bytes"]) == (1, 1, 0, None)
    assert list(one["batches"]) == ["4"]
    for found in (pipeline, tp):
        assert "error" not in found, found
        assert found["tokens"] == one["tokens"]
        assert found["same_tokens"] == len(found["tokens"]) == 25
        assert found["times_one"] == one["stream"]["us"] / found["stream"]["us"]
    assert len(set(one["tokens"])) > 1
    assert one["decode"] == "eager"
    assert (pipeline["ranks"], pipeline["tp"]) == (2, 1)
    assert (pipeline["hops"], pipeline["hop_bytes"]) == (1, 128 * 4)
    assert (one["layers"], pipeline["layers"], tp["layers"]) == ([3], [2, 1], [3])
    assert (pipeline["transfer_us"] > 0, pipeline["sum_us"]) == (True, None)
    assert (tp["transfer_us"], tp["sum_us"] > 0) == (None, True)
    assert (one["transfer_us"], one["sum_us"]) == (None, None)
    assert pipeline["hop_us"] == pipeline["stream"]["us"] - one["stream"]["us"]
    assert pipeline["in_flight"]["requests"] == 4
    assert (tp["ranks"], tp["tp"], tp["hops"]) == (2, 2, 0)
    assert tp["sums"] == "group"
    assert tp["in_flight"]["requests"] == 2


def test_on_gpus_each_way_to_sum_is_measured(monkeypatch):
    """What is known of the others does not depend on one that fails."""
    asked = []

    def result_of(words, timeout):
        size, tp, sums = words[6].split("=")[1], words[10], words[12]
        decode = words[words.index("--decode") + 1] if "--decode" in words else None
        asked.append((int(size), int(tp), sums, decode))
        if tp == "2":
            return {"error": "it took more than 9 s"}
        return ONE | TWO if size == "2" else dict(ONE)

    monkeypatch.setattr(processes, "result_of", result_of)
    monkeypatch.setattr(ranks, "write_checkpoint", lambda path, config: None)
    results = list(ranks.run(Settings(ranks=(2, 4))))
    ways = [(size, *way) for size in (2, 4) for way in ways_of(size)]
    assert asked == [(1, 1, "group", None), *ways]
    late = "it took more than 9 s"
    assert [result.get("error") for result in results[1:5]] == [None, late, late, late]
    lines = [ranks.text(result) for result in results[2:5]]
    for line, way in zip(lines, ("group", "one_shot", "persistent"), strict=True):
        assert " ".join(line.split()) == f"ranks 2 GPUs, tp 2, {way} llama-3.1-8b none: {late}"


def ways_of(size):
    shared = [("group", None), ("one_shot", "graph"), ("one_shot", "persistent")]
    return [(1, "group", None), *((size, *way) for way in shared)]


def test_one_gpu_has_nothing_to_share(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (result,) = ranks.run(Settings())
    assert result["error"] == "there is one GPU, nothing to share"
    assert ranks.text(result).endswith("none: there is one GPU, nothing to share")


def test_a_run_that_fails_says_why(tmp_path):
    found = ranks._ranks(str(tmp_path), 2, 1, "cpu", torch.float32)
    assert re.fullmatch(r"rank [01]: .*config\.json.*", found["error"])


def test_a_run_that_takes_too_long_says_so():
    found = processes.result_of([sys.executable, "-c", "import time; time.sleep(600)"], 0.1)
    assert found == {"error": "it took more than 0.1 s"}


@pytest.mark.parametrize(
    ("num_stages", "lengths"),
    [(1, [32]), (2, [17, 15]), (4, [8, 9, 9, 6]), (8, [4, 4, 4, 4, 4, 5, 5, 2])],
)
def test_the_head_counts_as_what_it_reads(num_stages, lengths):
    """In an 8B model as 2.4 layers, and the embedding as nothing: one row of it is read."""
    config = ModelConfig.from_dict(PRESETS["llama-3.1-8b"])
    layers = measured_rank.even_layers(config, num_stages, torch.bfloat16, 257)
    assert [len(part) for part in layers] == lengths
    assert [i for part in layers for i in part] == list(range(32))


class At:
    """A request whose tokens were read at these seconds."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)


def test_the_rate_is_that_while_all_are_in_flight():
    # From 2 to 6: 2.5 is the only token of the first, 3 and 6 of the second, 4 and 5 of the third.
    requests = [At(0, 2.5, 7), At(1, 3, 6), At(2, 4, 5, 8)]
    assert measured_rank._rate(requests) == 5 / 4


STREAM = {"us": 4000.0, "p20": 3900.0, "p80": 4100.0, "n": 5}
ONE = {"ranks": 1, "tp": 1, "model": "m", "dtype": "bfloat16", "stream": STREAM, "hops": 0}
ONE |= {"in_flight": {"requests": 2, "tokens_per_second": 250.0}, "tokens": [1, 2, 3]}
ONE |= {"transfer_us": None, "sum_us": None}
ONE |= {"new_tokens": 129, "batches": {"4": 900.0, "8": 1500.0}, "hop_bytes": None}
TWO = ONE | {"ranks": 2, "hops": 1, "hop_bytes": 8192.0, "tokens": [1, 2, 4], "batches": {}}
TWO |= {"transfer_us": 21.5}
TWO |= {"stream": STREAM | {"us": 4040.0}, "in_flight": {"requests": 4, "tokens_per_second": 475.0}}


def test_text_of_one():
    line = ranks.text(ONE)
    assert line.index("bfloat16") == report.HEADER.index("dtype")
    assert " ".join(line.split()) == (
        "ranks one GPU m bfloat16 one prompt 250.0 tokens/s, p20-p80 3.900-4.100 ms a token; "
        "batch of 4 900.0; batch of 8 1500.0"
    )


@pytest.mark.parametrize(
    ("changes", "way", "hop"),
    [
        ({}, "2 GPUs, pipeline", "; a hop 8192 bytes, +40.0 us, 21.5 us by itself"),
        (
            {
                "tp": 2,
                "sums": "one_shot",
                "hops": 0,
                "hop_bytes": None,
                "transfer_us": None,
                "sum_us": 9.25,
            },
            "2 GPUs, tp 2, one_shot",
            "; a sum 9.2 us by itself",
        ),
        (
            {
                "tp": 2,
                "sums": "one_shot",
                "decode": "persistent",
                "hops": 0,
                "hop_bytes": None,
                "transfer_us": None,
                "sum_us": 9.25,
            },
            "2 GPUs, tp 2, persistent",
            "; a sum 9.2 us by itself",
        ),
    ],
)
def test_text_of_several(changes, way, hop):
    result = {"model": "m"} | ranks._beside(ONE, TWO | changes)
    assert " ".join(ranks.text(result).split()) == (
        f"ranks {way} m bfloat16 one prompt 247.5 tokens/s, p20-p80 3.900-4.100 ms a token "
        f"(0.99x of one GPU's); 4 prompts 475.0 tokens/s (1.90x){hop}; 2 of 129 tokens the same"
    )
