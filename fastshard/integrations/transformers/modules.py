"""Modules that stand in for those of a transformers decoder, with the same parameters and calls."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from fastshard import ops
from fastshard.integrations.transformers.attention import (
    NAME,
    attend,
    check_no_gradient,
    check_no_weights,
)
from fastshard.nn.linear import PackedLinears
from fastshard.ops.attention import ROTATING_ROWS

# transformers' names of the activations that ops.fused_mlp has
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# transformers' own hooks, which see nothing unless outputs are asked for
CAPTURING_HOOK = "output_capturing_hook"
_MASKS = (NAME, "sdpa", "eager")  # attn_implementations


class RMSNorm(nn.Module):
    """RMSNorm in one pass, rounded to the dtype before the weight, as transformers does."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``hidden_states``, ``[..., hidden_size]``."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def add(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(norm(hidden_states + residual), hidden_states + residual)``."""
        return ops.add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class Projection(nn.Linear):
    """A linear layer by ``ops.linear``, over the parameters of another."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input``, ``[..., in_features]``, to ``[..., out_features]``."""
        return ops.linear(input, self.weight, self.bias)


class Rotary(nn.Module):
    """Makes the table that the layers rotate by, once a forward pass, by transformers' own angles.

    All its scaled and dynamic types work, at any position. The table is float32, where transformers
    rounds cosine and sine to the model's dtype.
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table, each token's row in it, and a flag for the layers.

        Args:
            x: Any tensor of the device.
            position_ids: ``[b | 1, s]``.

        Returns:
            ``[(b | 1) * s, rotary_dim // 2, 2]`` float32; ``[b, s]`` or ``[s]`` int64; ``[1]``
            int32, 0, to become 1 where a layer's cache is full.
        """
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), position_ids)
        half = cos.shape[-1] // 2  # transformers repeats the angles for the second half
        table = torch.stack([cos[..., :half], sin[..., :half]], dim=-1).flatten(0, 1)
        rows = torch.arange(table.shape[0], device=table.device)
        overflow = torch.zeros(1, dtype=torch.int32, device=table.device)
        return table, rows if cos.shape[0] == 1 else rows.view(cos.shape[:2]), overflow


class StandIn(PackedLinears):
    """Base of modules whose linear layers are packed: another module cannot take their place."""

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module) and name in self.__dict__.get("_modules", {}):
            raise RuntimeError(
                f"{name} of an accelerated model cannot be replaced, as by an adapter or a "
                "quantiser: call fastshard.integrations.transformers.undo(model) first"
            )
        super().__setattr__(name, value)


class MLP(StandIn):
    """Gate, up and down projection in one op; gate and up are packed row by row."""

    def __init__(self, mlp: nn.Module, activation: str):
        super().__init__()
        self.activation = activation
        layers = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
        self.adopt(layers, interleaved=True)
        self.down_proj = Projection(mlp.down_proj)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map ``x``, ``[..., hidden_size]``, to its shape, plus ``residual``."""
        weights = self.packed_weight, self.down_proj.weight
        return ops.fused_mlp(x, *weights, activation=self.activation, residual=residual)


class Attention(StandIn):
    """Self-attention of Llama, Mistral, Qwen2 and Qwen3, over any of transformers' caches.

    ``position_embeddings`` are what ``Rotary`` gives. A layer of a static cache is appended to and
    attended to where it lies, its length read on the device; any other cache by its ``update``.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.config = attention.config
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_key_value_groups = attention.num_key_value_groups
        self.scaling = attention.scaling
        self.is_causal = attention.is_causal
        # A Mistral layer knows it from the config, a Llama layer not even that.
        model_window = self.config.sliding_window if self.config.model_type == "mistral" else None
        self.sliding_window = getattr(attention, "sliding_window", model_window)
        self.adopt({name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj = Projection(attention.o_proj)
        has_norms = hasattr(attention, "q_norm")
        self.q_norm = RMSNorm(attention.q_norm) if has_norms else None
        self.k_norm = RMSNorm(attention.k_norm) if has_norms else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Attend, and append to the cache: updates it.

        Args:
            hidden_states: ``[b, s, hidden_size]``.
            position_embeddings: What ``Rotary`` gave.
            attention_mask: As of ``attention`` beside this module.
            cache: Of any kind but paged.
            past_key_values: Name of ``cache`` before transformers 5.24.
            kwargs: transformers' flags; weights cannot be returned.

        Returns:
            ``[b, s, hidden_size]`` and None.

        Raises:
            RuntimeError: the module is in training mode, or a gradient is asked for.
            ValueError: attention weights are asked for, or the cache is full.
            TypeError: the cache is paged.
        """
        if self.training:
            raise RuntimeError(
                "an accelerated model must be in eval mode: call model.eval(), "
                "or fastshard.integrations.transformers.undo(model) to train it"
            )
        if self.config._attn_implementation not in _MASKS:
            raise ValueError(
                f"attn_implementation of an accelerated model must be one of {', '.join(_MASKS)}, "
                f"whose masks it reads, got {self.config._attn_implementation!r}"
            )
        check_no_weights(kwargs)
        check_no_gradient(hidden_states)
        q, k, v = self._project(hidden_states)
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(
                f"cache must be a transformers Cache for attention {NAME!r}, got "
                f"{type(cache).__name__}; undo(model) and attn_implementation 'sdpa' can do it"
            )
        layer = None if cache is None else static_layer(cache, self.layer_idx)
        if layer is None:
            out = self._attend_by_update(q, k, v, position_embeddings, attention_mask, cache)
        else:
            out = self._attend_in_place(q, k, v, position_embeddings, attention_mask, layer)
        return self.o_proj(out.flatten(2)), None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, ``[b, s, heads, head_dim]``: views of one product, q and k normed."""
        qkv = ops.linear(x, self.packed_weight, self.packed_bias).unflatten(-1, (-1, self.head_dim))
        num_kv_heads = qkv.shape[2] // (self.num_key_value_groups + 2)
        heads = (self.num_key_value_groups * num_kv_heads, num_kv_heads, num_kv_heads)
        q, k, v = qkv.split(heads, dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _attend_by_update(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        table, rows, _ = position_embeddings
        k = ops.apply_rope(k, table, rows, interleaved=False)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        rope = {"rope_table": table, "rope_positions": rows}
        options = {"window": self.sliding_window, "softmax_scale": self.scaling}
        return attend(q, k, v, mask, self.is_causal, **options, **rope)

    def _attend_in_place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        layer: StaticLayer,
    ) -> Tensor:
        table, rows, overflow = position_embeddings
        b, s = q.shape[:2]
        check_room(layer, s)
        if not layer.is_initialized:
            layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        length = layer.cumulative_length.view(1)
        slots = length if s == 1 else length + torch.arange(s, device=q.device)
        append = (k, v, table, rows, layer.keys, layer.values, slots, overflow)
        if s * self.num_key_value_groups < ROTATING_ROWS:
            q, rope = ops.rope_append(q, *append, interleaved=False), {}
        else:
            ops.rope_append(q[:, :, :0], *append, interleaved=False)
            rope = {"rope_table": table, "rope_positions": rows}
        layer.cumulative_length.add_(s)
        if self.layer_idx == self.config.num_hidden_layers - 1:
            torch._assert_async(overflow == 0, "a static cache is full")
        # Of a new prompt the host knows all lengths, and attention chooses by them.
        is_new = mask is None and s > 1
        lengths = None if is_new else layer.cumulative_length.expand(b)
        caches = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        options = {"window": self.sliding_window, "softmax_scale": self.scaling}
        return attend(q, *caches, mask, kv_lengths=lengths, **options, **rope)


def static_layer(cache: Cache, index: int) -> StaticLayer | None:
    """The cache's layer where it is a plain static one: its memory is as the kernels take it."""
    if type(cache).update is not Cache.update or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if type(layer) is StaticLayer else None


def check_room(layer: StaticLayer, num_tokens: int) -> None:
    """Raise where the host can know that the cache is full without waiting for a device."""
    if torch.compiler.is_compiling() or not layer.is_initialized or layer.keys.is_cuda:
        return
    held = int(layer.cumulative_length)
    if held + num_tokens > layer.max_cache_len:
        raise ValueError(
            f"the cache must have room for all tokens: {held} of its {layer.max_cache_len} slots "
            f"are used, got {num_tokens} tokens more"
        )
