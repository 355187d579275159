"""Which calls of an accelerated language model are a step, and of which models: the rules."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from fastshard import ops
from fastshard.integrations.transformers.layers import FusedLayer
from fastshard.integrations.transformers.modules import (
    MLP,
    Attention,
    Projection,
    RMSNorm,
    static_layer,
)
from fastshard.ops.decode import DecodeWeights

_SETTINGS = {"use_cache": (None, True), "return_dict": (None, True), "logits_to_keep": (0, 1)}
"""Arguments of ``forward`` and the values that a step goes with; of others None and False."""
_GIVEN = ("cache", "past_key_values", "attention_mask", "position_ids")


_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def may_step(model: PreTrainedModel) -> bool:
    """Whether ``forward`` is transformers' own of a language model: a subclass may do more."""
    return any(type(model).forward is cls.forward for cls in _MODELS)


def cache_of(kwargs: dict) -> object:
    """The cache, by its name before transformers 5.24 too."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def only(mask: object) -> object:
    """The mask of all layers, where ``generate`` made one for each type of layer and has one."""
    is_for_all = isinstance(mask, dict) and list(mask) == ["full_attention"]
    return mask["full_attention"] if is_for_all else mask


def is_step(model: PreTrainedModel, input_ids: Tensor | None, mask: object, kwargs: dict) -> bool:
    """Whether a call is for one token a row over a plain static cache that holds a prompt."""
    cache, config = cache_of(kwargs), model.config
    if model.training or config.output_hidden_states or not config.return_dict:
        return False
    if input_ids is None or input_ids.shape[1:] != (1,) or input_ids.dtype != torch.int64:
        return False
    if not isinstance(cache, Cache) or not len(cache.layers) == config.num_hidden_layers > 0:
        return False
    layers = [static_layer(cache, i) for i in range(len(cache.layers))]
    if not all(layer is not None and layer.is_initialized for layer in layers):
        return False
    b, device = len(input_ids), layers[0].keys.device
    if input_ids.device != device or any(len(layer.keys) < b for layer in layers):
        return False
    positions = kwargs.get("position_ids")
    if positions is not None and tuple(positions.shape) not in ((1, 1), (b, 1)):
        return False
    is_span = isinstance(mask, Tensor) and mask.dtype == torch.int64
    if mask is not None and not (is_span and mask.dim() == 4 and mask.shape[1:] == (1, 1, 2)):
        return False
    return all(
        name in _GIVEN or any(value is known for known in _SETTINGS.get(name, (None, False)))
        for name, value in kwargs.items()
    )


def refusal(model: PreTrainedModel, cache: Cache, batch: int) -> str | None:
    """Why the op cannot take this model and batch, or None."""
    decoder = model.base_model
    layers, reason = decoder.layers, _refusal_of_modules(model)
    if reason is not None:
        return reason
    if len(cache.layers) != len(layers):
        return f"the cache must have {len(layers)} layers, got {len(cache.layers)}"
    attention = layers[0].self_attn
    head_dim, num_heads = attention.head_dim, decoder.config.num_attention_heads
    if attention.scaling != head_dim**-0.5:
        return f"attention must be scaled by head_dim ** -0.5, got {attention.scaling}"
    weight = model.get_output_embeddings().weight
    if weight.is_cuda and weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weights must be float16 or bfloat16 on a GPU, got {weight.dtype}"
    if not all(parameter.is_contiguous() for parameter in _unpacked(model)):
        return "weights must be contiguous"
    return ops.decode_step_refusal(
        batch=batch,
        hidden_size=decoder.config.hidden_size,
        intermediate_size=decoder.config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_heads // attention.num_key_value_groups,
        head_dim=head_dim,
        num_layers=len(layers),
        activation=layers[0].mlp.activation,
    )


def _refusal_of_modules(model: PreTrainedModel) -> str | None:
    """Which module does not compute what the op does, as one that was put there later."""
    decoder, head = model.base_model, model.get_output_embeddings()
    if not isinstance(head, Projection) or head.bias is not None:
        return "the output layer must be a linear one without bias"
    if type(decoder.embed_tokens) is not nn.Embedding or type(decoder.norm) is not RMSNorm:
        return "the embedding and the last norm must be as accelerate left them"
    for index, layer in enumerate(decoder.layers):
        if not isinstance(layer, FusedLayer) or type(layer.self_attn) is not Attention:
            return f"layers.{index} must be as accelerate left it"
        if layer.self_attn.layer_idx != index:
            return f"layers.{index} must use the cache's layer {index}"
        if not isinstance(layer.mlp, MLP):
            return "the MLPs are transformers' own"
        if any(
            type(n) is not RMSNorm for n in (layer.input_layernorm, layer.post_attention_layernorm)
        ):
            return f"the norms of layers.{index} must be as accelerate left them"
    return None


def _unpacked(model: PreTrainedModel):
    """Yield the weights that the op reads where they are, not packed."""
    yield from (model.base_model.embed_tokens.weight, model.get_output_embeddings().weight)
    for layer in model.base_model.layers:
        yield from (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)


def weights_of(model: PreTrainedModel) -> DecodeWeights:
    """As the op takes them: the modules' own memory, no copies."""
    decoder, layers = model.base_model, model.base_model.layers
    attentions = [layer.self_attn for layer in layers]

    def each(tensors) -> list[Tensor]:
        found = [tensor for tensor in tensors if tensor is not None]
        return [tensor.detach() for tensor in found]

    return DecodeWeights(
        sa_norm=each(layer.input_layernorm.weight for layer in layers),
        qkv_weight=each(attention.packed_weight for attention in attentions),
        output_weight=each(attention.o_proj.weight for attention in attentions),
        mlp_norm=each(layer.post_attention_layernorm.weight for layer in layers),
        gate_up_weight=each(layer.mlp.packed_weight for layer in layers),
        down_weight=each(layer.mlp.down_proj.weight for layer in layers),
        qkv_bias=each(attention.packed_bias for attention in attentions),
        output_bias=each(attention.o_proj.bias for attention in attentions),
        q_norm=each(a.q_norm.weight for a in attentions if a.q_norm is not None),
        k_norm=each(a.k_norm.weight for a in attentions if a.k_norm is not None),
        embedding=decoder.embed_tokens.weight.detach(),
        norm=decoder.norm.weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
    )
