"""Tiny random models of transformers, built in memory."""

import copy
import inspect

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What each has that the others have not: ties and biases, a window, a window in some layers, norms
_FAMILIES = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
}
FAMILIES = list(_FAMILIES)
# The name of a forward pass's cache: past_key_values before transformers 5.24
CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else ("past_key_values")
)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """Build a model in eval mode, every parameter random; ``changes`` are of its config."""
    cls, config, own = _FAMILIES[family]
    torch.manual_seed(7)
    model = cls(config(**{**_COMMON, **own, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config of its own: accelerating a model changes its config."""
    return copy.deepcopy(model)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Tokens that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, shape, generator=generator)
