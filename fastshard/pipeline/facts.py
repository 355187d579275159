"""What the ranks of a run must have in common."""

import argparse
from dataclasses import fields
from typing import Any

import fastshard
from fastshard.checkpoint import Checkpoint

# What a rank may have of its own, or what rank 0 alone reads.
_NOT_COMPARED = ("prompt", "prompts_file", "model", "device", "run", "command_line")


def describe_rank(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Version, config, tensors and options, as ``dist.check_same`` takes them.

    Of the weights only the headers of local files are read, and a few bytes of each tensor.
    """
    facts: dict[str, Any] = {"fastshard version": fastshard.__version__}
    for field in fields(checkpoint.config):
        value = getattr(checkpoint.config, field.name)
        facts[f"{field.name} in the config"] = str(value)
    for name, text in checkpoint.weights.describe().items():
        facts[f"tensor {name}"] = text
    for name, value in vars(args).items():
        if name not in _NOT_COMPARED:
            facts[f"option --{name.replace('_', '-')}"] = str(value)
    return facts
