"""Random checkpoints as Hugging Face lays them out, for benchmarks that load one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(path: Path, config: Mapping) -> None:
    """Write ``config.json`` and random bfloat16 weights, one file a layer, into a folder.

    Args:
        path: An existing folder.
        config: Hugging Face's, of a Llama, Mistral or Qwen2.
    """
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    hidden_size, vocab_size = config["hidden_size"], config["vocab_size"]
    shapes = layer_shapes(config)
    files: list[dict] = [
        {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}
        for i in range(config["num_hidden_layers"])
    ]
    ends: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden_size,)}
    heads = ["lm_head.weight"] if not config.get("tie_word_embeddings") else []
    for name in ["model.embed_tokens.weight", *heads]:
        ends[name] = (vocab_size, hidden_size)
    largest = max(math.prod(shape) for file in [*files, ends] for shape in file.values())
    values = torch.randn(largest, dtype=torch.bfloat16)  # every tensor begins with the same ones
    weight_map = {}
    for i, file in enumerate([*files, ends]):
        name = f"model-{i:05d}.safetensors"
        weight_map |= dict.fromkeys(file, name)
        tensors = {key: _scaled(values, shape) for key, shape in file.items()}
        save_file(tensors, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _scaled(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix whose outputs are as large as its inputs, or a vector of values about 1."""
    values = values[: math.prod(shape)].view(shape)
    return values * shape[-1] ** -0.5 if len(shape) == 2 else 1 + values / 8


def layer_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Names within a layer -> shapes."""
    hidden_size, intermediate_size = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden_size // config["num_attention_heads"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q_rows, hidden_size),
        "self_attn.k_proj.weight": (kv_rows, hidden_size),
        "self_attn.v_proj.weight": (kv_rows, hidden_size),
        "self_attn.o_proj.weight": (hidden_size, q_rows),
        "mlp.gate_proj.weight": (intermediate_size, hidden_size),
        "mlp.up_proj.weight": (intermediate_size, hidden_size),
        "mlp.down_proj.weight": (hidden_size, intermediate_size),
        "input_layernorm.weight": (hidden_size,),
        "post_attention_layernorm.weight": (hidden_size,),
    }
    if config["model_type"] == "qwen2":
        for name in "qkv":
            rows = q_rows if name == "q" else kv_rows
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    return shapes
