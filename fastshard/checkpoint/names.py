"""Names and row order of tensors: Hugging Face's, and torchtune's, which are ours."""

import re

import torch
from torch import Tensor

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
}
for _ours, _theirs in zip(
    ("q_proj", "k_proj", "v_proj", "output_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    strict=True,
):
    for _kind in ("weight", "bias"):
        _LAYER[f"attn.{_ours}.{_kind}"] = f"self_attn.{_theirs}.{_kind}"

_ROTATED = re.compile(r"attn\.[qk]_(proj\.(weight|bias)|norm\.scale)$")
# Buffers that older exports of Llama wrote; every loader derives them from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of our ``layers.{i}...`` or top-level tensor."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}" if match else _TOP[name]


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor of either naming belongs to; None for the others."""
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def is_hugging_face(name: str) -> bool:
    """Whether this naming is Hugging Face's, rather than torchtune's."""
    return name.startswith("model.") or name == "lm_head.weight"


def is_known_top_level(name: str) -> bool:
    """Whether every causal language model of either naming may have this tensor."""
    return name in _TOP or name in _TOP.values()


def is_derived(name: str) -> bool:
    """Whether the tensor follows from the config, so that nobody reads it."""
    return bool(_DERIVED.search(name))


def is_rotated(name: str) -> bool:
    """Whether the rows of our tensor are dims of q or k heads, whose order RoPE fixes."""
    return bool(_ROTATED.search(name))


@torch.no_grad()
def copy_rotated(target: Tensor, source: Tensor, head_dim: int, rotary_dim: int) -> None:
    """Write rows in half-rotation order into ``target`` in interleaved order, head by head.

    Dim i < rotary_dim / 2 of a head goes to 2i, dim rotary_dim / 2 + i to 2i + 1, others stay.

    Args:
        target: ``[n * head_dim, ...]``.
        source: The same shape, any dtype.
    """
    target, source = target.unflatten(0, (-1, head_dim)), source.unflatten(0, (-1, head_dim))
    pairs = source[:, :rotary_dim].unflatten(1, (2, rotary_dim // 2)).transpose(1, 2)
    target[:, :rotary_dim].unflatten(1, (rotary_dim // 2, 2)).copy_(pairs)
    target[:, rotary_dim:].copy_(source[:, rotary_dim:])
