"""config_of: the ModelConfig of a torchtune decoder, or of one of torchtune's builders."""

from collections.abc import Callable

import torch
from torch import nn
from torchtune import modules

from fastshard.integrations.torchtune.adapter import LAYER_PARTS, reason_against
from fastshard.integrations.torchtune.attention import Attention
from fastshard.integrations.torchtune.layers import FeedForward, RMSNorm
from fastshard.integrations.torchtune.rope import is_interleaved, scaling_of
from fastshard.models import ModelConfig


def config_of(model: nn.Module | Callable[[], nn.Module]) -> ModelConfig:
    """Read the sizes of a torchtune decoder: ``GeneralMHA(config_of(llama3_1_8b), shard)``.

    Args:
        model: ``TransformerDecoder``, accelerated or not; or a builder without arguments, such as
            ``llama3_1_8b``, which is called without memory for weights.

    Returns:
        Config of a decoder with torchtune's parameter names, so that a state dict of it loads.

    Raises:
        ValueError: fastshard has no such decoder; the message says what differs.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    if not isinstance(model, modules.TransformerDecoder):
        raise ValueError(
            f"model must be or build a torchtune TransformerDecoder, got {type(model).__name__}"
        )
    layers = {f"layers.{i}": _sizes_of_layer(f"layers.{i}", m) for i, m in enumerate(model.layers)}
    first = layers["layers.0"]
    for name, sizes in layers.items():
        if sizes != first:
            raise ValueError(f"{name} must be like layers.0, {first}, got {sizes}")
    if type(model.norm) not in (modules.RMSNorm, RMSNorm) or model.norm.eps != first["norm_eps"]:
        raise ValueError(f"norm must be an RMSNorm like those of layers.0, got {model.norm}")
    vocab_size, hidden_size = model.tok_embeddings.weight.shape
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len(layers),
        tie_word_embeddings=_is_tied(model),
        **first,
    )


def _sizes_of_layer(name: str, layer: nn.Module) -> dict:
    """Keywords of ``ModelConfig`` that one layer decides."""
    if not isinstance(layer, modules.TransformerSelfAttentionLayer):
        raise ValueError(
            f"{name} must be a TransformerSelfAttentionLayer, got {type(layer).__name__}"
        )
    for part in LAYER_PARTS:
        module = getattr(layer, part)
        if type(module) not in (Attention, FeedForward, RMSNorm):
            reason = reason_against(module)
            if reason is not None:
                raise ValueError(f"{name}.{part} must be what fastshard can compute: {reason}")
    attn, rope = layer.attn, layer.attn.pos_embeddings
    if attn.q_norm is not None:
        raise ValueError(f"{name}.attn must have no q_norm, which torchtune has after RoPE")
    if rope is None:
        raise ValueError(f"{name}.attn must have pos_embeddings, got None")
    if layer.sa_norm.eps != layer.mlp_norm.eps:
        raise ValueError(
            f"{name} must have one eps, got {layer.sa_norm.eps} and {layer.mlp_norm.eps}"
        )
    return {
        "model_type": "llama" if is_interleaved(rope) else "qwen2",
        "intermediate_size": layer.mlp.w1.weight.shape[0],
        "num_heads": attn.num_heads,
        "num_kv_heads": attn.num_kv_heads,
        "head_dim": attn.head_dim,
        "max_seq_len": rope.max_seq_len,
        "norm_eps": layer.sa_norm.eps,
        "rope_base": float(rope.base),
        "rope_scaling": scaling_of(rope),
        "rope_interleaved": is_interleaved(rope),
        "qkv_bias": attn.q_proj.bias is not None,
        "output_bias": attn.output_proj.bias is not None,
        "attn_dropout": attn.attn_dropout,
    }


def _is_tied(model: modules.TransformerDecoder) -> bool:
    """Whether the head is the embedding.

    Raises:
        ValueError: it is neither that nor a plain layer over the vocabulary.
    """
    output = model.output
    if isinstance(output, modules.TiedLinear) and output.tied_module is model.tok_embeddings:
        return True
    if type(output) is not nn.Linear or output.bias is not None:
        raise ValueError(
            "output must be a Linear without bias, or tied to tok_embeddings, "
            f"got {type(output).__name__}"
        )
    if output.weight.shape != model.tok_embeddings.weight.shape:
        raise ValueError(
            f"output must have the shape of tok_embeddings, "
            f"{list(model.tok_embeddings.weight.shape)}, got {list(output.weight.shape)}"
        )
    return False
