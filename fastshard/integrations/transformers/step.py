"""One token a row over a static cache in one op: ``forward`` of an accelerated language model.

Every other call, and a model that ``ops.decode_step`` does not take, goes through the layers.
"""

import inspect
import warnings
import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastshard import ops
from fastshard.integrations.transformers.modules import (
    CAPTURING_HOOK,
    check_room,
)
from fastshard.integrations.transformers.step_rules import (
    cache_of,
    is_step,
    only,
    refusal,
    weights_of,
)
from fastshard.ops.decode import DecodeArguments

_NOT_RESIDENT = "decode_step: cannot be resident"


class StepForward:
    """Stands in for ``forward`` of ``model``, a causal language model."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._step: _Step | None = None
        self._refusals: dict[tuple, str] = {}  # batch, sizes and places -> why it is not run so

    def __getstate__(self) -> dict:
        """Without the step: it is of this model's memory, which a copy has not."""
        return self.__dict__ | {"_step": None, "_refusals": {}}

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's class: transformers looks which arguments there are."""
        signature = inspect.signature(type(self._model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, input_ids: Tensor | None = None, *args, **kwargs):
        """As ``forward`` of the model's class."""
        logits = None
        if not torch.compiler.is_compiling():
            mask = only(kwargs.get("attention_mask"))
            step = None if args else self._step_for(input_ids, mask, kwargs)
            logits = None if step is None else self._take(step, input_ids, mask, kwargs)
        if logits is not None:
            name = "cache" if "cache" in kwargs else "past_key_values"
            return CausalLMOutputWithPast(logits=logits, **{name: kwargs[name]})
        self._step = None  # what it holds may change before the next one
        return type(self._model).forward(self._model, input_ids, *args, **kwargs)

    def _step_for(self, input_ids: Tensor | None, mask: object, kwargs: dict) -> "_Step | None":
        """The step that this call is, or None."""
        model, cache = self._model, cache_of(kwargs)
        if not is_step(model, input_ids, mask, kwargs):
            return None
        step = self._step  # another thread may put its own there
        if step is None or not step.is_of(cache, len(input_ids)):
            key = _refusal_key(model, cache, len(input_ids))
            if key in self._refusals:
                return None
            reason = refusal(model, cache, len(input_ids))
            if reason is not None:
                self._refusals[key] = reason
                return None
            step = self._step = _Step(model, weakref.ref(cache, self._forget), len(input_ids))
        return None if step.is_watched() else step

    def _forget(self, cache: weakref.ref) -> None:
        """Let go of the weights with the cache, which nobody has any more."""
        self._step = None

    def _take(
        self, step: "_Step", input_ids: Tensor, mask: Tensor | None, kwargs: dict
    ) -> Tensor | None:
        """``[b, 1, vocab_size]``, or None where the GPU cannot run it."""
        cache = cache_of(kwargs)
        try:
            return step(input_ids, mask, kwargs.get("position_ids"), cache)
        except RuntimeError as error:
            if _NOT_RESIDENT not in str(error):
                raise
            reason = str(error).splitlines()[0]
        self._refusals[_refusal_key(self._model, cache, len(input_ids))] = reason
        warnings.warn(f"tokens go through the layers: {reason}", RuntimeWarning, stacklevel=3)
        return None


class _Step:
    """The steps of one prompt. The op's arguments are checked with the first of them.

    The cache is not held: it is the caller's to let go of.
    """

    def __init__(self, model: PreTrainedModel, cache: weakref.ref, batch: int):
        self._cache, self._batch = cache, batch
        decoder = model.base_model
        attentions = [layer.self_attn for layer in decoder.layers]
        weights = weights_of(model)
        num_heads = decoder.config.num_attention_heads
        vocab_size = len(weights.head)
        self._rotary, self._dtype = decoder.rotary_emb, weights.head.dtype
        self._weights = weights
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
        self._parameters = [module._parameters for module in self._modules if module._parameters]
        self._places = self._find_places()

    def is_of(self, cache: Cache, batch: int) -> bool:
        """Whether it is of this cache and batch, and the weights are where they were."""
        is_same = self._cache() is cache and self._batch == batch
        return is_same and self._places == self._find_places()

    def _find_places(self) -> list[int]:
        """Addresses; none can come again, as the step holds the weights that it began with."""
        return [
            parameter.data_ptr()
            for parameters in self._parameters
            for parameter in parameters.values()
            if parameter is not None
        ]

    def is_watched(self) -> bool:
        """Whether somebody waits for the call of a module, or for gradients."""
        if nn.modules.module._has_any_global_hook():
            return True
        needs_grad = torch.is_grad_enabled()
        for module in self._modules:
            if "forward" in module.__dict__:
                return True
            if module._forward_hooks or module._forward_pre_hooks:
                hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
                if any(getattr(hook, "__name__", "") != CAPTURING_HOOK for hook in hooks):
                    return True
            if needs_grad and any(
                p is not None and p.requires_grad for p in module._parameters.values()
            ):
                return True
        return False

    def __call__(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        """Logits ``[b, 1, vocab_size]`` in the model's dtype; appends to the cache.

        Args:
            input_ids: ``[b, 1]``.
            mask: None or a span, as in ``attention`` beside this module.
            position_ids: ``[b | 1, 1]``; by default the length of the cache.
            cache: Of static layers.
        """
        layers = cache.layers
        check_room(layers[0], 1)
        b, length = len(input_ids), layers[0].cumulative_length
        position_ids = length.view(1, 1) if position_ids is None else position_ids
        table, rows, overflow = self._rotary(input_ids, position_ids)
        inputs = {
            "x": input_ids.flatten().contiguous(),  # one column of a prompt is not
            "rope_table": table,
            "positions": rows.flatten().expand(b).contiguous(),
            "slots": length.repeat(b),
            "first_key": None if mask is None else mask[:, 0, 0, 0].expand(b).contiguous(),
            "overflow": overflow,
            # Beam search puts others in their place.
            "k_cache": [layer.keys for layer in layers],
            "v_cache": [layer.values for layer in layers],
        }
        if self._arguments is None:
            x = inputs.pop("x")
            ops.decode_step(x, self._weights, **inputs, **self._state)
            inputs |= {"k_cache": [], "v_cache": []}
            self._arguments = DecodeArguments(
                x=x, weight_in_fp32=False, **vars(self._weights), **inputs, **self._state
            )
        else:
            torch.ops.fastshard.decode_step.default(*self._arguments._replace(**inputs))
        torch._foreach_add_([layer.cumulative_length for layer in layers], 1)
        torch._assert_async(overflow == 0, "a static cache is full, or there is no such token")
        return self._state["out"].to(self._dtype, copy=True)[:, None]


def _refusal_key(model: PreTrainedModel, cache: Cache, batch: int) -> tuple:
    """What a refusal holds for: it changes when the weights are moved or cast."""
    weight = model.get_output_embeddings().weight
    return batch, len(cache.layers), weight.data_ptr(), weight.dtype
