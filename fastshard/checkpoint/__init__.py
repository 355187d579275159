"""Checkpoints: Hugging Face directories and hub repositories, read one shard at a time."""

from fastshard.checkpoint.checkpoint import Checkpoint, GenerationDefaults
from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.tokenizer import TextTokenizer
from fastshard.checkpoint.weights import load_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "GenerationDefaults",
    "TextTokenizer",
    "load_weights",
]
