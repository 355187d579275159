"""Sampling settings: checked before any token, and handed to the op as they are."""

import pytest
import torch

from fastshard import ops
from fastshard.sampling import Sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0, got inf"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": float("nan")}, r"min_p must be in \[0, 1\], got nan"),
        ({"seed": 2**63}, rf"seed must be in \[0, 2\*\*63\), got {2**63}"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_every_setting_reaches_the_op():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    step = torch.tensor(3)
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "seed": 7}
    chosen = Sampling(**settings).choose(logits, step)
    assert torch.equal(chosen, ops.sample(logits, step, **settings))
    for name, neutral in {
        "temperature": 0.0,
        "top_k": 1,
        "top_p": 1e-6,
        "min_p": 1.0,
        "seed": 8,
    }.items():
        other = Sampling(**(settings | {name: neutral})).choose(logits, step)
        assert not torch.equal(chosen, other), name


def test_the_default_is_greedy():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampling().choose(logits, torch.tensor(0)), logits.argmax(dim=-1))
