"""Small random checkpoints, written by transformers: the reference for loading and for numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 72,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large, so that a wrong one shows
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (config class, model class, settings); head_dim 16: not hidden_size / num_heads
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 16}),
    "llama-3.2": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama-bias": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16, "sliding_window": 5}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "qwen2-tied-window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "num_key_value_heads": 1}),
}


def make_reference(family: str, seed: int = 0, **changes):
    """A transformers model in float32, every weight random: no norm is 1, no bias 0.

    Args:
        changes: Settings of its config in place of the family's.
    """
    import transformers

    config_class, model_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**(SIZES | settings | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else noise * 0.2)
    return model


def write_byte_checkpoint(path: Path, family: str = "llama", chat_template: str | None = None):
    """A whole checkpoint that generates bytes, without an end of its own, in a folder of its own.

    Its head_dim is the family's, but 64 for llama: one that ops.decode_step takes.
    """
    changes = {"head_dim": 64} if family == "llama" else {}
    make_reference(family, vocab_size=258, **changes).save_pretrained(path)
    write_tokenizer(path, **{"chat_template": chat_template} if chat_template else {})
    edit_json(path / "config.json", eos_token_id=None)
    (path / "generation_config.json").write_text("{}")


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of a safetensors file (dots in names as __); None removes one."""
    content = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in content.items() if v is not None}, path)


def write_tokenizer(path: Path, adds_bos: bool = False, **config) -> None:
    """A byte-level tokenizer without merges: <s>, </s> and 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    } | config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
