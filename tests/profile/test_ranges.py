"""Ranges of layers: no hook without them, their names with them, and what asks for NVTX."""

import contextlib

import pytest
import torch
from torch.nn.modules import module as global_hooks

import fastshard
from fastshard import cli, generate_command
from fastshard.profile import ranges

PROMPT = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def model():
    return fastshard.load(device="cpu")


def hooks(model):
    """Every hook that a pass of ``model`` would call."""
    of_all = [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
    own = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [hook for pair in [of_all, *own] for hook in (*pair[0].values(), *pair[1].values())]


def range_names(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.is_user_annotation]


def test_no_hook_by_default(model):
    assert hooks(model) == []
    assert range_names(lambda: model.generate(PROMPT)) == []
    with ranges():
        assert len(hooks(model)) == 2
    assert hooks(model) == []
    with pytest.raises(ZeroDivisionError), ranges():
        raise ZeroDivisionError
    assert hooks(model) == []


def test_names_of_layers(model):
    with ranges():
        names = range_names(lambda: model.generate(PROMPT))
    parts = ["", ".sa_norm", ".attn", ".attn.output_proj", ".mlp"]
    layers = [f"layers.{i}{part}" for i in range(5) for part in parts]
    assert names == ["shard 0-4", "tok_embeddings", *layers, "norm"]


def test_shards_keep_their_global_indices():
    shard = fastshard.Shard("demo", start_layer=3, end_layer=4, n_layers=5)
    last = fastshard.load(shard=shard, device="cpu")
    with ranges():
        names = range_names(lambda: last.generate(hidden_state=torch.randn(1, 2, 256)))
    top = [name for name in names if name.count(".") < 2]
    assert top == ["shard 3-4", "layers.3", "layers.4", "norm"]


def test_other_modules_have_no_range():
    with ranges():
        assert range_names(lambda: torch.nn.Linear(2, 2)(torch.ones(1, 2))) == []


def test_a_pass_that_raises_closes_its_ranges(model):
    activities = [torch.profiler.ProfilerActivity.CPU]
    broken = model.model.layers["2"].attn.register_forward_pre_hook(lambda *arguments: 1 / 0)
    with ranges(), torch.profiler.profile(activities=activities) as profile:
        with pytest.raises(ZeroDivisionError):
            model.generate(PROMPT)
        broken.remove()
        model.generate(PROMPT)
    passes = [event for event in profile.events() if event.name == "shard 0-4"]
    assert [event.cpu_parent for event in passes] == [None, None]
    layers = [event for event in profile.events() if event.name == "layers.0"]
    assert [event.cpu_parent for event in layers] == passes  # the broken one has an end too


@pytest.fixture
def nvtx(monkeypatch):
    """A GPU's NVTX by what was begun and ended: a list of words."""
    seen = []

    @contextlib.contextmanager
    def emit_nvtx():
        seen.append("begin")
        yield
        seen.append("end")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", emit_nvtx)
    return seen


@pytest.mark.parametrize(("value", "is_on"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_turns_ranges_on_for_a_command(monkeypatch, nvtx, model, value, is_on):
    monkeypatch.delenv("FASTSHARD_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTSHARD_NVTX", value)
    during = []
    monkeypatch.setattr(generate_command, "run", lambda args: during.extend([*nvtx, *hooks(model)]))
    cli.main(["generate", "a"])
    assert nvtx == ["begin", "end"] * is_on
    assert len(during) == 3 * is_on
    assert hooks(model) == []


def test_ranges_alone_leave_nvtx(nvtx):
    with ranges():
        pass
    assert nvtx == []
