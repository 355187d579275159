"""One token a row over a static cache in one op: ``forward`` of an accelerated language model.

Every other call, and a model that ``ops.decode_step`` does not take, goes through the layers.
"""

import inspect
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastshard import ops
from fastshard.integrations.transformers.modules import (
    CAPTURING_HOOK,
    MLP,
    Projection,
    check_room,
    static_layer,
)
from fastshard.ops.decode import DecodeArguments, DecodeWeights

_SETTINGS = {"use_cache": (None, True), "return_dict": (None, True), "logits_to_keep": (0, 1)}
"""Arguments of ``forward`` and the values that a step goes with; of others None and False."""
_GIVEN = ("cache", "past_key_values", "attention_mask", "position_ids")
_NOT_RESIDENT = "decode_step: cannot be resident"


class StepForward:
    """Stands in for ``forward`` of ``model``, a causal language model."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._step: _Step | None = None
        self._refusals: dict[int, str] = {}  # batch -> why it is not run so

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's class: transformers looks which arguments there are."""
        signature = inspect.signature(type(self._model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, input_ids: Tensor | None = None, *args, **kwargs):
        """As ``forward`` of the model's class."""
        logits = None
        if not torch.compiler.is_compiling():
            mask = _only(kwargs.get("attention_mask"))
            step = None if args else self._step_for(input_ids, mask, kwargs)
            logits = None if step is None else self._take(step, input_ids, mask, kwargs)
        if logits is not None:
            name = "cache" if "cache" in kwargs else "past_key_values"
            return CausalLMOutputWithPast(logits=logits, **{name: kwargs[name]})
        self._step = None  # what it holds may change before the next one
        return type(self._model).forward(self._model, input_ids, *args, **kwargs)

    def _step_for(self, input_ids: Tensor | None, mask: object, kwargs: dict) -> "_Step | None":
        """The step that this call is, or None."""
        model, cache = self._model, _cache(kwargs)
        if not _is_step(model, input_ids, mask, kwargs) or len(input_ids) in self._refusals:
            return None
        held = (cache, len(input_ids), *_pointers(model))
        if self._step is None or self._step.held != held:
            reason = _refusal(model, cache, len(input_ids))
            if reason is not None:
                self._refusals[len(input_ids)] = reason
                return None
            self._step = _Step(model, cache, held)
        return None if self._step.is_hooked() else self._step

    def _take(
        self, step: "_Step", input_ids: Tensor, mask: Tensor | None, kwargs: dict
    ) -> Tensor | None:
        """``[b, 1, vocab_size]``, or None where the GPU cannot run it."""
        try:
            return step(input_ids, mask, kwargs.get("position_ids"))
        except RuntimeError as error:
            if _NOT_RESIDENT not in str(error):
                raise
            reason = str(error).splitlines()[0]
        self._refusals[len(input_ids)] = reason
        warnings.warn(f"tokens go through the layers: {reason}", RuntimeWarning, stacklevel=3)
        return None


class _Step:
    """The steps of one prompt. The op's arguments are checked with the first of them."""

    def __init__(self, model: PreTrainedModel, cache: Cache, held: tuple):
        self.held = held
        decoder, batch = model.base_model, held[1]
        attentions = [layer.self_attn for layer in decoder.layers]
        weights = _weights(model)
        num_heads = decoder.config.num_attention_heads
        vocab_size = len(weights.head)
        self._rotary, self._dtype = decoder.rotary_emb, weights.head.dtype
        self._weights, self._layers = weights, cache.layers
        with torch.inference_mode(False):  # later steps may be outside of it
            workspace = ops.new_decode_workspace(weights, batch, num_heads=num_heads)
            out = weights.head.new_empty((batch, vocab_size), dtype=torch.float32)
        self._state = {
            "workspace": workspace,
            "out": out,
            "num_heads": num_heads,
            "norm_eps": decoder.norm.variance_epsilon,
            "rope_interleaved": False,
            "activation": decoder.layers[0].mlp.activation,
            "windows": [attention.sliding_window or 0 for attention in attentions],
        }
        self._arguments: DecodeArguments | None = None
        self._modules = [module for module in model.modules() if module is not model]

    def is_hooked(self) -> bool:
        """Whether somebody waits for the call of a module."""
        return any(
            getattr(hook, "__name__", "") != CAPTURING_HOOK
            for module in self._modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )

    def __call__(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Logits ``[b, 1, vocab_size]`` in the model's dtype; appends to the cache.

        Args:
            input_ids: ``[b, 1]``.
            mask: None or a span, as in ``attention`` beside this module.
            position_ids: ``[b | 1, 1]``; by default the length of the cache.
        """
        check_room(self._layers[0], 1)
        b, length = len(input_ids), self._layers[0].cumulative_length
        position_ids = length.view(1, 1) if position_ids is None else position_ids
        table, rows, overflow = self._rotary(input_ids, position_ids)
        inputs = {
            "x": input_ids.flatten(),
            "rope_table": table,
            "positions": rows.flatten().expand(b).contiguous(),
            "slots": length.repeat(b),
            "first_key": None if mask is None else mask[:, 0, 0, 0].expand(b).contiguous(),
            "overflow": overflow,
            # Beam search puts others in their place.
            "k_cache": [layer.keys for layer in self._layers],
            "v_cache": [layer.values for layer in self._layers],
        }
        if self._arguments is None:
            x = inputs.pop("x")
            ops.decode_step(x, self._weights, **inputs, **self._state)
            self._arguments = DecodeArguments(
                x=x, weight_in_fp32=False, **vars(self._weights), **inputs, **self._state
            )
        else:
            torch.ops.fastshard.decode_step.default(*self._arguments._replace(**inputs))
        torch._foreach_add_([layer.cumulative_length for layer in self._layers], 1)
        torch._assert_async(overflow == 0, "a static cache is full, or there is no such token")
        return self._state["out"].to(self._dtype, copy=True)[:, None]


def _cache(kwargs: dict) -> object:
    """The cache, by its name before transformers 5.24 too."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _only(mask: object) -> object:
    """The mask of all layers, where ``generate`` made one for each type of layer and has one."""
    is_for_all = isinstance(mask, dict) and list(mask) == ["full_attention"]
    return mask["full_attention"] if is_for_all else mask


def _is_step(model: PreTrainedModel, input_ids: Tensor | None, mask: object, kwargs: dict) -> bool:
    """Whether a call is for one token a row over a plain static cache that holds a prompt."""
    cache, config = _cache(kwargs), model.config
    if model.training or config.output_hidden_states or not config.return_dict:
        return False
    if input_ids is None or input_ids.shape[1:] != (1,):
        return False
    if not isinstance(cache, Cache) or len(cache.layers) == 0:
        return False
    layers = [static_layer(cache, i) for i in range(len(cache.layers))]
    if not all(layer is not None and layer.is_initialized for layer in layers):
        return False
    is_span = isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int64
    return (mask is None or is_span) and all(
        name in _GIVEN or any(value is known for known in _SETTINGS.get(name, (None, False)))
        for name, value in kwargs.items()
    )


def _refusal(model: PreTrainedModel, cache: Cache, batch: int) -> str | None:
    """Why the op cannot take this model and batch, or None."""
    decoder = model.base_model
    layers, head = decoder.layers, model.get_output_embeddings()
    attention = layers[0].self_attn
    head_dim, num_heads = attention.head_dim, decoder.config.num_attention_heads
    if len(cache.layers) != len(layers):
        return f"the cache must have {len(layers)} layers, got {len(cache.layers)}"
    if not isinstance(head, Projection) or head.bias is not None:
        return "the output layer must be a linear one without bias"
    if not all(isinstance(layer.mlp, MLP) for layer in layers):
        return "the MLPs are transformers' own"
    if attention.scaling != head_dim**-0.5:
        return f"attention must be scaled by head_dim ** -0.5, got {attention.scaling}"
    weight = head.weight
    if weight.is_cuda and weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weights must be float16 or bfloat16 on a GPU, got {weight.dtype}"
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


def _weights(model: PreTrainedModel) -> DecodeWeights:
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


def _pointers(model: PreTrainedModel) -> tuple:
    """What changes when the weights are moved or cast."""
    decoder = model.base_model
    tensors = (
        decoder.layers[0].self_attn.packed_weight,
        decoder.layers[-1].mlp.down_proj.weight,
        decoder.norm.weight,
    )
    return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
