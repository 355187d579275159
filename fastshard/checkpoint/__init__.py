"""Checkpoints: Hugging Face directories and hub repositories, read one shard at a time."""

from fastshard.checkpoint.checkpoint import Checkpoint, GenerationDefaults
from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.fit import check_fit, even_split, model_bytes, split_that_fits
from fastshard.checkpoint.tokenizer import TextTokenizer
from fastshard.checkpoint.weights import load_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "GenerationDefaults",
    "TextTokenizer",
    "check_fit",
    "even_split",
    "load_weights",
    "model_bytes",
    "split_that_fits",
]
