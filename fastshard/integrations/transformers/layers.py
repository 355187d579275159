"""Decoder layers whose residual additions are part of the ops around them.

A stand-in shares everything with the layer that it replaces, also the modules it holds and its
hooks, and is of its class: transformers' capture of hidden states goes on working.
"""

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from fastshard.integrations.transformers.modules import MLP


class FusedLayer:
    """The forward pass of all four families' layers."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """Map ``hidden_states``, ``[b, s, hidden_size]``, to its shape."""
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h, residual = self.post_attention_layernorm.add(h, hidden_states)
        if isinstance(self.mlp, MLP):
            return self.mlp(h, residual=residual)
        return residual + self.mlp(h)


class FusedLlamaLayer(FusedLayer, LlamaDecoderLayer):
    pass


class FusedMistralLayer(FusedLayer, MistralDecoderLayer):
    pass


class FusedQwen2Layer(FusedLayer, Qwen2DecoderLayer):
    pass


class FusedQwen3Layer(FusedLayer, Qwen3DecoderLayer):
    pass


_FUSED = {
    cls.__mro__[2]: cls
    for cls in (FusedLlamaLayer, FusedMistralLayer, FusedQwen2Layer, FusedQwen3Layer)
}


def fused(layer: nn.Module) -> nn.Module:
    """A stand-in of ``layer``, over the same modules."""
    cls = _FUSED[type(layer)]
    stand_in = cls.__new__(cls)
    stand_in.__dict__.update(layer.__dict__)
    return stand_in
