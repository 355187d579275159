"""Shapes of published models, as the Hugging Face ``config.json`` that comes with each."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastshard.checkpoint import Checkpoint
from fastshard.models import ModelConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PRESETS = {
    "llama-3.2-1b": {  # meta-llama/Llama-3.2-1B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {  # meta-llama/Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {  # meta-llama/Llama-2-7b-hf
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {  # Qwen/Qwen2.5-0.5B
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {  # Qwen/Qwen2.5-7B
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {  # mistralai/Mistral-7B-v0.1
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
}


def preset(name: str, *, num_layers: int | None = None, max_seq_len: int | None = None):
    """The ``ModelConfig`` of a preset, perhaps of its first layers or a shorter context only.

    Raises:
        ValueError: there is no such preset, or it has fewer layers or positions.
    """
    if name not in PRESETS:
        raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
    config = ModelConfig.from_dict(PRESETS[name])
    for key, asked in (("num_layers", num_layers), ("max_seq_len", max_seq_len)):
        if asked is None:
            continue
        if not 1 <= asked <= getattr(config, key):
            raise ValueError(f"{key} of {name} must be 1 to {getattr(config, key)}, got {asked}")
        config = replace(config, **{key: asked})
    windowed = tuple(i for i in config.windowed_layers if i < config.num_layers)
    return replace(config, windowed_layers=windowed)


def find_model(name: str) -> tuple[ModelConfig, Mapping[str, Any]]:
    """Config of a folder's, a preset's or the hub's model, and the ``config.json`` it came from.

    Reads no weights.

    Args:
        name: Of a preset, unless there is such a folder; with a slash a hub id.

    Raises:
        ValueError: it is none of these, or (``CheckpointError``) the ``config.json`` is missing,
            wrong, or cannot be fetched.
    """
    if Path(name).is_dir() or "/" in name:
        checkpoint = Checkpoint(name)
        return checkpoint.config, checkpoint.raw_config
    if name not in PRESETS:
        raise ValueError(
            f"model must be a folder, a hub id like owner/name, or one of {', '.join(PRESETS)}, "
            f"got {name!r}"
        )
    return preset(name), PRESETS[name]
