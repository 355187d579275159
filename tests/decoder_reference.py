"""A decoder in plain PyTorch, float32 or float64, written out: what the models are held to."""

import math

import torch
from torch import Tensor

from fastshard import ModelConfig
from fastshard.nn import RopeScaling

ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x.clamp(min=0),
}


def random_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict of the model's names and shapes in which every parameter matters.

    Matrices keep activations at size 1; scales and biases are far from 1 and 0.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            value = torch.randn(tensor.shape) * tensor.shape[1] ** -0.5
        else:
            value = torch.randn(tensor.shape) * 0.5 + (1.0 if name.endswith("scale") else 0.0)
        state[name] = value.to(tensor.dtype)
    return state


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale


def rotate(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """x [b, s, n, d] by positions [b | 1, s]."""
    half = config.head_dim // 2
    theta = config.rope_base ** (-torch.arange(half, dtype=x.dtype) / half)
    if config.rope_scaling is not None:
        theta = scaled(theta, config.rope_scaling)
    angle = (positions[..., None] * theta)[:, :, None]  # [b | 1, s, 1, half]
    cos, sin = angle.cos(), angle.sin()
    if config.rope_interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scaled(theta: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: long wavelengths by the factor, short ones kept, those between blended."""
    turns = scaling.original_max_position_embeddings * theta / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (turns - low) / (high - low)
    blended = (1 - blend) * theta / scaling.factor + blend * theta
    return theta.where(turns > high, blended.where(turns >= low, theta / scaling.factor))


def layer(
    state: dict, prefix: str, x: Tensor, bias: Tensor, positions: Tensor, config: ModelConfig
) -> Tensor:
    """x [b, s, hidden_size]; bias [b | 1, s, s] is added to the scores."""

    def project(x, name):
        weight, offset = state[f"{prefix}{name}.weight"], state.get(f"{prefix}{name}.bias")
        out = x @ weight.to(x.dtype).T
        return out if offset is None else out + offset.to(x.dtype)

    def norm(x, name):
        return rms_norm(x, state[f"{prefix}{name}.scale"].to(x.dtype), config.norm_eps)

    h = norm(x, "sa_norm")
    q, k, v = (
        project(h, f"attn.{name}_proj").unflatten(-1, (-1, config.head_dim)) for name in "qkv"
    )
    if config.qk_norm:
        q, k = norm(q, "attn.q_norm"), norm(k, "attn.k_norm")
    q, k = rotate(q, positions, config), rotate(k, positions, config)
    group = config.num_heads // config.num_kv_heads
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(config.head_dim) + bias[:, None]
    weights = scores.softmax(-1).nan_to_num()  # a query that sees nothing gives zeros
    x = x + project(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), "attn.output_proj")
    h = norm(x, "mlp_norm")
    gate, up = project(h, "mlp.w1"), project(h, "mlp.w3")
    return x + project(ACTIVATIONS[config.hidden_act](gate) * up, "mlp.w2")


def hidden_states(
    state: dict,
    config: ModelConfig,
    tokens: Tensor,
    layers: range,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Embed tokens [b, s] and run the layers; ``bias`` None: causal."""
    s = tokens.shape[1]
    if bias is None:
        bias = torch.full((1, s, s), -math.inf, dtype=dtype).triu(1)
    if positions is None:
        positions = torch.arange(s)[None]
    x = state["tok_embeddings.weight"].to(dtype)[tokens]
    for i in layers:
        x = layer(state, f"layers.{i}.", x, bias.to(dtype), positions, config)
    return x


def logits(state: dict, config: ModelConfig, x: Tensor) -> Tensor:
    """Norm and head of x [b, s, hidden_size]."""
    head = state.get("output.weight", state.get("tok_embeddings.weight"))
    x = rms_norm(x, state["norm.scale"].to(x.dtype), config.norm_eps)
    return x @ head.to(x.dtype).T
