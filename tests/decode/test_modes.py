"""Decode modes: which one runs where, what is said when it cannot, and who decides."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastshard import ModelConfig, Shard
from fastshard.decode import MODES, check_mode, modes
from fastshard.models import TensorPart

CONFIG = ModelConfig("llama", 96, 64, 80, 200, 8, 2, 64, 32, 1e-5)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("FASTSHARD_DECODE", raising=False)


@pytest.fixture
def has_kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: True)


def fake(
    device="cuda:0",
    dtype=torch.float16,
    layers=200,
    parts=(),
    capturable=True,
    launch_refusal=None,
    **changes,
):
    config = SimpleNamespace(**{**CONFIG.__dict__, **changes})
    shard = Shard("fake", 0, layers - 1, 200)
    model = SimpleNamespace(
        parts=dict(parts), is_capturable=capturable, launch_refusal=launch_refusal
    )
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, config=config, shard=shard, model=model
    )


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cpu", "eager"),
        ("eager", "cpu", "eager"),
        ("persistent", "cpu", "persistent"),
        ("auto", "cuda:0", "persistent"),
        ("persistent", "cuda:0", "persistent"),
        ("graph", "cuda:0", "graph"),
        ("eager", "cuda:0", "eager"),
    ],
)
@pytest.mark.usefixtures("has_kernel")
def test_a_mode_that_can_run_is_taken_without_a_word(mode, device, expected):
    assert modes.choose_mode(mode, [fake(device, layers=100)], 8) == (expected, None)


UNSUPPORTED = [
    (9, {}, "batch must be 1 to 8, got 9"),
    (1, {"hidden_size": 60}, "hidden_size must be a positive multiple of 8, got 60"),
    (1, {"intermediate_size": 84}, "intermediate_size must be a positive multiple of 8, got 84"),
    (1, {"num_heads": 34}, "num_heads must be 1 to 8 times the 2 key/value heads, got 34"),
    (1, {"head_dim": 80}, "head_dim must be one of 64, 96, 128, got 80"),
    (1, {"hidden_act": "tanh"}, "activation must be one of .*, got 'tanh'"),
    (1, {"layers": 129}, "num_layers must be 1 to 128, got 129"),
]


@pytest.mark.parametrize("mode", ["auto", "persistent"])
@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize(("batch", "changes", "reason"), UNSUPPORTED)
@pytest.mark.usefixtures("has_kernel")
def test_what_the_op_does_not_take_falls_back_to_the_graph(mode, is_second, batch, changes, reason):
    models = [fake(layers=100), fake(**{"layers": 100, **changes})]
    chosen, said = modes.choose_mode(mode, models[:: 1 if is_second else -1], batch)
    assert chosen == "graph"
    with pytest.raises(ValueError, match=f"^{reason}$"):
        raise ValueError(said)


@pytest.mark.usefixtures("has_kernel")
def test_float32_on_a_gpu_falls_back():
    chosen = modes.choose_mode("auto", [fake(dtype=torch.float32)], 1)
    assert chosen == ("graph", "weights must be float16 or bfloat16 on CUDA, got torch.float32")


def test_a_build_without_the_kernel_falls_back(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    chosen = modes.choose_mode("persistent", [fake()], 1)
    assert chosen == ("graph", "this build of fastshard has no CUDA kernel of decode_step")


PARTS = {"layers.0.mlp.w2.weight": TensorPart(1, 0, 2)}
DIVIDED = "ranks add up by their group"
WAITS = "a CUDA graph cannot hold a sum over ranks by other than nccl"


@pytest.mark.parametrize(
    ("mode", "device", "capturable", "expected"),
    [
        ("auto", "cuda:0", True, ("graph", None)),
        ("persistent", "cuda:0", True, ("graph", DIVIDED)),
        ("graph", "cuda:0", True, ("graph", None)),
        ("auto", "cuda:0", False, ("eager", WAITS)),
        ("persistent", "cuda:0", False, ("eager", DIVIDED)),
        ("graph", "cuda:0", False, ("eager", WAITS)),
        ("eager", "cuda:0", False, ("eager", None)),
        ("persistent", "cpu", False, ("eager", DIVIDED)),
        ("auto", "cpu", False, ("eager", None)),
    ],
)
@pytest.mark.usefixtures("has_kernel")
def test_layers_that_a_group_adds_up_are_never_one_launch(mode, device, capturable, expected):
    """And only a group of NCCL's lets them be a graph."""
    settings = {"parts": PARTS, "capturable": capturable, "launch_refusal": DIVIDED}
    model = fake(device, layers=100, **settings)
    assert modes.choose_mode(mode, [fake(device, layers=100), model], 1) == expected


@pytest.mark.parametrize(
    ("mode", "changes", "expected"),
    [
        ("auto", {}, ("persistent", None)),
        ("persistent", {}, ("persistent", None)),
        ("graph", {}, ("graph", None)),
        (
            "auto",
            {"intermediate_size": 24},
            ("graph", "intermediate_size must be a positive multiple of 8, got 12"),
        ),
    ],
)
@pytest.mark.usefixtures("has_kernel")
def test_layers_that_ranks_add_up_in_one_shot_are_one_launch(mode, changes, expected):
    model = fake(layers=100, parts=PARTS)
    model.config = replace(CONFIG, **changes)
    assert modes.choose_mode(mode, [model], 1) == expected


def test_a_cpu_falls_back_to_eager():
    assert modes.choose_mode("graph", [fake("cpu")], 1) == (
        "eager",
        "a CUDA graph needs a GPU, got cpu",
    )
    assert modes.choose_mode("persistent", [fake("cpu", layers=9)], 9) == (
        "eager",
        "batch must be 1 to 8, got 9",
    )
    assert modes.choose_mode("auto", [fake("cpu")], 9) == ("eager", None)


@pytest.mark.parametrize("mode", MODES)
def test_the_argument_wins_over_the_variable(mode, monkeypatch):
    assert check_mode(None) == "auto"
    monkeypatch.setenv("FASTSHARD_DECODE", mode)
    assert check_mode(None) == mode
    assert check_mode("eager") == "eager"
    monkeypatch.setenv("FASTSHARD_DECODE", "")
    assert check_mode(None) == "auto"


def test_an_unknown_mode_is_named(monkeypatch):
    names = "auto, persistent, graph, eager"
    with pytest.raises(ValueError, match=f"decode must be one of {names}, got 'fast'"):
        check_mode("fast")
    monkeypatch.setenv("FASTSHARD_DECODE", "Graph")
    with pytest.raises(ValueError, match=f"FASTSHARD_DECODE must be one of {names}, got 'Graph'"):
        check_mode(None)
