"""``fastshard bench``: its arguments, its errors, the cases it makes; a short run on a GPU."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from fastshard import cli
from fastshard.bench import arguments, case, command, presets
from fastshard.bench.case import MODES, PEERS, Bench, Case, Problem, Settings, Unavailable, Variant
from fastshard.bench.report import Line, Skipped
from fastshard.bench.timing import Timing
from helpers import skip_or_fail


def bench(*arguments) -> int:
    try:
        return cli.main(["bench", *arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prefil"],
            "one of attention, linear, mlp, norm, prefill, decode, start, load, adapters, ranks, "
            "all, got 'prefil'",
        ),
        (
            ["--vs", "eager,jax"],
            "none, or some of eager, compile, autotune, sdpa, torchtune, got 'eager,jax'",
        ),
        (["--batch", "0"], "must be a positive integer, got '0'"),
        (["--context", "1k"], "must be a positive integer, got '1k'"),
        (["--decode", "fast"], "invalid choice: 'fast'"),
        (["--dtype", "float32"], "invalid choice: 'float32'"),
        (["--time-limit", "-1"], "must be a finite number of at least 0, got '-1'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench measures on a GPU, and torch .* sees none; without one, fastshard info says"),
        (["--model", "gpt-2"], "model must be one of llama-3.2-1b, .*, got 'gpt-2'"),
        (
            ["--model", "llama-2-7b", "--context", "64", "8192"],
            "max_seq_len of llama-2-7b must be 1 to 4096, got 8192",
        ),
        (
            ["--model", "llama-3.2-1b", "--layers", "20"],
            "num_layers of llama-3.2-1b must be 1 to 16, got 20",
        ),
    ],
)
def test_errors_in_one_line(no_gpu, arguments, message, capsys, tmp_path):
    assert bench("decode", "--json", str(tmp_path / "x.json"), *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not (tmp_path / "x.json").exists()


def test_every_argument_arrives(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(command, "run", lambda *args, **keywords: given.update(keywords, args=args))
    path = tmp_path / "x.json"
    arguments = ["mlp", "decode", "--model", "llama-2-7b", "qwen2.5-7b", "--batch", "1", "8"]
    arguments += [
        "--context",
        "64",
        "--layers",
        "2",
        "--ranks",
        "2",
        "4",
        "--decode",
        "graph",
        "--dtype",
        "float16",
    ]
    arguments += ["--vs", "eager,autotune", "--compile-all", "--time-limit", "9", "--rounds", "7"]
    arguments += ["--json", str(path), "--plot", "x.svg"]
    assert bench(*arguments) == 0
    names, settings = given.pop("args")
    assert names == ["mlp", "decode"]
    assert settings == Settings(
        models=("llama-2-7b", "qwen2.5-7b"),
        batches=(1, 8),
        contexts=(64,),
        modes=("graph",),
        peers=("eager", "autotune"),
        compiles_all=True,
        dtype=torch.float16,
        num_layers=2,
        ranks=(2, 4),
    )
    del given["say"]
    assert given == {
        "command": ["fastshard", "bench", *arguments],
        "json_path": path,
        "plot_path": Path("x.svg"),
        "time_limit": 9.0,
        "rounds": 7,
    }


def test_defaults(monkeypatch):
    given = []
    monkeypatch.setattr(command, "run", lambda *args, **keywords: given.extend(args))
    assert bench() == 0
    assert given == [command.NAMES, Settings()]
    assert bench("--vs", "none") == 0
    assert given[3].peers == ()
    assert bench("mlp", "all") == 0
    assert given[4] == command.NAMES


def test_the_parser_knows_what_there_is():
    assert arguments.BENCHMARKS == command.NAMES
    assert arguments.DECODE_MODES == MODES
    assert arguments.PEERS == PEERS


def shapes(name: str, **settings) -> list[str]:
    bench = Bench(torch.device("meta"), None, None, Settings(**settings))
    return [problem.shape for problem in command.BENCHMARKS[name](bench)]


def test_default_shapes_are_the_goals():
    assert shapes("decode") == [
        "llama-3.2-1b, b1, 1024 keys",
        "llama-3.2-1b, b8, 1024 keys",
        "llama-3.1-8b, b1, 1024 keys",
        "qwen2.5-0.5b, b1, 1024 keys",
    ]
    assert shapes("attention") == [f"b1 32/8 d128 {keys} keys" for keys in (1024, 4096, 32768)]
    assert shapes("mlp") == [
        "1 x 4096, intermediate 14336",
        "1 x 2048, intermediate 8192",
        "16 x 4096, intermediate 14336",
    ]
    sizes = ("4096 -> 4096", "4096 -> 16384", "2048 -> 128256")
    assert shapes("linear") == [f"{rows} x {size}" for size in sizes for rows in (1, 8, 16)]
    sizes = ("16384 x 4096", "64 x 4096", "1 x 4096", "1 x 4096, in L2", "65536 x 128")
    names = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
    expected = [f"{name} {size}" for name in names for size in (*sizes, "4096 x 16384")]
    assert shapes("norm") == expected
    assert shapes("prefill") == [
        "attn causal 32/8 d128, 2048 tokens",
        "attn causal 32/8 d128, 8192 tokens",
        "attn causal 32/8 d64, 2048 tokens",
        "attn full 32/8 d128, 2048 tokens",
        "attn mask 32/8 d128, 2048 tokens",
        "mlp 2048 x 4096 x 14336",
        "mlp 2048 x 2048 x 8192",
        "llama-3.1-8b, b1, 2048 tokens",
        "llama-3.2-1b, b1, 2048 tokens",
    ]


def test_shapes_that_are_asked_for():
    model = {"models": ("qwen2.5-0.5b",)}
    assert shapes("decode", **model, batches=(2, 4), contexts=(64,), num_layers=3) == [
        "qwen2.5-0.5b, 3 layers, b2, 64 keys",
        "qwen2.5-0.5b, 3 layers, b4, 64 keys",
    ]
    assert shapes("decode", batches=(3,))[0] == "llama-3.2-1b, b3, 1024 keys"
    assert shapes("attention", **model, contexts=(64, 128)) == [
        "b1 14/2 d64 64 keys",
        "b1 14/2 d64 128 keys",
    ]
    assert shapes("mlp", **model, batches=(2,)) == ["2 x 896, intermediate 4864"]
    assert shapes("linear", **model, batches=(2,)) == [
        "2 x 896 -> 1152",
        "2 x 896 -> 896",
        "2 x 896 -> 151936",
    ]
    assert shapes("norm", **model, batches=(2,)) == [
        f"{name} 2 x 896" for name in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
    ]
    assert shapes("norm", batches=(2,))[0] == "rms_norm 2 x 4096"
    assert shapes("prefill", **model, batches=(2,), contexts=(64,), num_layers=3) == [
        "attn causal 14/2 d64, 64 tokens, b2",
        "attn full 14/2 d64, 64 tokens, b2",
        "attn mask 14/2 d64, 64 tokens, b2",
        "mlp 128 x 896 x 4864",
        "qwen2.5-0.5b, 3 layers, b2, 64 tokens",
    ]
    assert shapes("prefill", contexts=(64,))[:2] == [
        "attn causal 32/8 d128, 64 tokens",
        "attn full 32/8 d128, 64 tokens",
    ]


class Clock:
    """Limits and a stopwatch that measure nothing: a run's time is what it says."""

    def read(self, num_bytes):
        return type("TrafficLimit", (), {"us": 5.0})

    def us(self, limit, num_bytes, flops):
        return {"read": 5.0, "copy": 4.0, "mma": 3.0}[limit]

    def measure(self, runs, rounds=None):
        return {name: Timing(run, run, run, 1) for name, run in runs.items()}


def results_of(variants, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    golden = torch.ones(4, dtype=torch.float64)
    case = Case(
        "mlp", "1 x 2", torch.float16, 10, 20, lambda: golden, variants, lambda call: call(1)
    )
    bench = Bench(torch.device("cpu"), Clock(), Clock(), Settings())
    return list(command._results([Problem("mlp", "1 x 2", lambda: [case])], bench))


def variant(name, us, value, is_peer=True):
    return Variant(name, lambda: lambda i: us if i else torch.full((4,), value), is_peer)


def fails(error):
    def prepare():
        raise error

    return prepare


def test_peers_are_compared_and_failures_listed(monkeypatch):
    results = results_of(
        [
            variant("fastshard", 10.0, 1.5, is_peer=False),
            Variant("absent", fails(Unavailable("not in this build"))),
            variant("torch eager", 30.0, 1.25),
            Variant("broken", fails(ImportError("no triton"))),
            variant("torch compile", 20.0, math.nan),
        ],
        monkeypatch,
    )
    ours, eager, compiled, absent, broken = results
    assert isinstance(ours, Line)
    assert (ours.times_best_peer, ours.error, ours.eager_error) == (2.0, 0.5, 0.25)
    assert (eager.times_best_peer, eager.percent_of_limit) == (20 / 30, 500 / 30)
    assert compiled.times_best_peer == 1
    assert math.isnan(compiled.error)
    assert absent == Skipped("mlp", "absent", "1 x 2", "not in this build")
    assert broken == Skipped("mlp", "broken", "1 x 2", "ImportError: no triton")


def test_a_case_that_does_not_fit_is_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bench = Bench(torch.device("cpu"), Clock(), Clock(), Settings())
    problem = Problem("decode", "huge", fails(torch.OutOfMemoryError("60 GiB\n asked for")))
    assert list(command._results([problem], bench)) == [
        Skipped("decode", "all", "huge", "60 GiB asked for")
    ]


def test_nothing_is_compiled_after_the_deadline():
    bench = Bench(torch.device("cpu"), None, None, Settings(deadline=0.0))
    with pytest.raises(Unavailable, match="the time limit has passed, nothing more is compiled"):
        bench.compiled(lambda: None)


TINY = {
    "model_type": "qwen2",
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-6,
}


class CpuClock(Clock):
    """Runs each variant, on whatever device, and says that it took a microsecond."""

    l2_bytes = 50_000

    def measure(self, runs, rounds=None):
        for run in runs.values():
            run()
        return super().measure(dict.fromkeys(runs, 1.0))


class CpuRun:
    """``GraphRun`` without a graph, of at least two sets of inputs."""

    def __init__(self, function, calls):
        self._function, self.calls = function, calls

    def __call__(self):
        assert self.calls >= 20
        first, second = (torch.cat([*self._function(i)]) for i in (0, 1))  # of a tensor or a tuple
        assert not first.equal(second)


OURS_AND_EAGER = {"fastshard", "torch eager"}
TORCHTUNE = OURS_AND_EAGER | {"torchtune"}
SDPA = {"fastshard", "sdpa flash", "sdpa math"}


@pytest.mark.parametrize(
    ("name", "num_shapes", "variants"),
    [
        ("attention", 2, {"": SDPA}),
        ("linear", 6, {"": OURS_AND_EAGER}),
        ("mlp", 2, {"": TORCHTUNE}),
        (
            "norm",
            12,
            {
                "rms_norm": TORCHTUNE,
                "add_": OURS_AND_EAGER,
                "layer_norm": OURS_AND_EAGER,
            },
        ),
        (
            "prefill",
            10,
            {
                "attn causal": SDPA | {"fastshard kernel"},
                "attn full": SDPA | {"fastshard kernel"},
                "attn mask": SDPA - {"sdpa flash"},
                "mlp": TORCHTUNE | {"fastshard tiles"},
                "tiny": TORCHTUNE,
            },
        ),
        (
            "decode",
            4,
            {
                "": {"fastshard persistent", "fastshard eager", "fastshard torchtune"}
                | {"fastshard torchtune graph", "torch eager", "torchtune"}
            },
        ),
    ],
)
def test_every_variant_computes_its_case(name, num_shapes, variants, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setattr(case, "GraphRun", CpuRun)
    monkeypatch.setattr(Bench, "hot_graph", lambda bench, call: lambda: call(0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    settings = Settings(
        models=("tiny",), batches=(1, 3), contexts=(32,), peers=("eager", "sdpa", "torchtune")
    )
    bench = Bench(torch.device("cpu"), CpuClock(), CpuClock(), settings)
    results = list(command._results(command.BENCHMARKS[name](bench), bench))
    lines = [result for result in results if isinstance(result, Line)]
    shapes = {line.shape for line in lines}
    assert len(shapes) == num_shapes
    for shape in shapes:
        (expected,) = (of for prefix, of in variants.items() if shape.startswith(prefix))
        assert {line.variant for line in lines if line.shape == shape} == expected
    for line in lines:
        eps = torch.finfo(torch.bfloat16).eps
        assert 0 <= line.error < (8 * eps if line.shape.startswith("tiny") else eps), line
        assert line.eager_error is not None
        assert line.num_bytes > 0
        assert line.flops > 0
        assert line.limit == {"norm": "copy", "prefill": "mma"}.get(name, "read")
    skipped = {result.variant for result in results if isinstance(result, Skipped)}
    not_on_a_cpu = {"sdpa cudnn", "sdpa efficient"}
    expected = {
        "attention": not_on_a_cpu,
        "prefill": not_on_a_cpu | {"fastshard graph"},
        "decode": {"fastshard graph"},
    }
    assert skipped == expected.get(name, set())


@pytest.mark.cuda
def test_a_short_run_on_a_gpu(tmp_path, capsys):
    if not torch.cuda.is_available():
        skip_or_fail("FASTSHARD_REQUIRE_GPU", "there is no CUDA device")
    path = tmp_path / "x.json"
    arguments = ["--model", "qwen2.5-0.5b", "--layers", "2", "--context", "1024", "--batch", "1"]
    arguments += ["--vs", "eager,sdpa", "--rounds", "5", "--json", str(path)]
    names = ("attention", "linear", "mlp", "norm", "prefill", "decode")
    assert bench(*names, *arguments) == 0, capsys.readouterr().err
    content = json.loads(path.read_text())
    ours = [line for line in content["lines"] if not line["is_peer"]]
    assert {line["case"] for line in ours} == set(names)
    for line in content["lines"]:
        assert 0 < line["percent_of_limit"] < 150, line
        if "greedy" in line["shape"]:  # near ties: another token may be chosen, almost as likely
            assert line["error"] < 0.05, line
        else:
            assert line["error"] <= 2 * line["eager_error"], line
    assert all(line["times_best_peer"] for line in ours)
    assert content["environment"]["code"]
    assert content["limits"]["copy_gbps"] > 0
    compiled = content["machine_code"]
    assert bool(compiled["kernels"]) != bool(compiled["missing"])
