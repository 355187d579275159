"""Decoders that replay single tokens over a static cache from a CUDA graph.

A step costs the host the launch of some hundred kernels, or the replay of one graph. The first
token over a cache runs as it is, which is also what a capture needs before it; the second is
captured; from then on inputs are copied to where the graph reads them. Whatever is not plain
decoding (another cache, several tokens, outputs to be recorded, hooks, a compiler) runs as before.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from fastshard.decode.modes import is_gpu
from fastshard.decode.static import capture
from fastshard.integrations.transformers.attention import NAME

_ARGUMENTS = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache"}
# Of each cache in use; neither is kept alive, nor copied with a model.
_steps: "weakref.WeakKeyDictionary[Cache, _Step]" = weakref.WeakKeyDictionary()


class _Graphed:
    """The forward pass of all four families' decoders."""

    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        """As the class beside this one in the bases."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if args or not _is_plain_step(self, input_ids, cache, kwargs):
            return super().forward(input_ids, *args, **kwargs)
        step = _steps.get(cache)
        if step is None:
            step = _steps[cache] = _Step()
        return step.run(self, super().forward, cache, {"input_ids": input_ids, **kwargs})


class GraphedLlama(_Graphed, LlamaModel):
    pass


class GraphedMistral(_Graphed, MistralModel):
    pass


class GraphedQwen2(_Graphed, Qwen2Model):
    pass


class GraphedQwen3(_Graphed, Qwen3Model):
    pass


_GRAPHED = {
    cls.__mro__[2]: cls for cls in (GraphedLlama, GraphedMistral, GraphedQwen2, GraphedQwen3)
}
MODELS = tuple(_GRAPHED)


def graphed(decoder: nn.Module) -> nn.Module:
    """A stand-in of ``decoder``, over the same modules."""
    cls = _GRAPHED[type(decoder)]
    stand_in = cls.__new__(cls)
    stand_in.__dict__.update(decoder.__dict__)
    return stand_in


class _Step:
    """The next token over one static cache."""

    def __init__(self):
        self._sources: tuple | None = None  # what a graph holds the addresses of
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._result: Any = None
        self._hidden: Tensor | None = None

    def run(self, decoder: nn.Module, forward: Callable, cache: Cache, arguments: dict):
        """Run ``forward(**arguments)``, by its graph from the second time on."""
        inputs = _tensors(arguments)
        sources = _sources(decoder, cache, inputs)
        if sources != self._sources:  # a first token, a reordered cache, a moved model
            self._sources, self._replay = sources, None
            return forward(**arguments)
        if self._replay is None and any(_has_hooks(module) for module in decoder.modules()):
            return forward(**arguments)
        if self._replay is None:
            self._capture(forward, arguments)
        else:
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given)
        self._replay()
        name = "cache" if "cache" in arguments else "past_key_values"
        # The next step overwrites what the graph wrote.
        return self._result(last_hidden_state=self._hidden.clone(), **{name: cache})

    def _capture(self, forward: Callable, arguments: dict) -> None:
        with torch.inference_mode(False):  # later steps may be outside of it
            arguments = _with_copies(arguments)
        self._inputs = _tensors(arguments)

        def launch() -> None:
            out = forward(**arguments)
            self._result, self._hidden = type(out), out.last_hidden_state

        self._replay = capture(launch, arguments["input_ids"].device)


def _is_plain_step(decoder: nn.Module, input_ids: Tensor | None, cache, kwargs: dict) -> bool:
    if torch.compiler.is_compiling() or input_ids is None or not is_gpu(input_ids.device):
        return False
    if input_ids.shape[1] != 1 or torch.is_grad_enabled() or decoder.training:
        return False
    config = decoder.config
    if config.output_hidden_states or config._attn_implementation != NAME:
        return False
    mask = kwargs.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    if any(not isinstance(m, Tensor) or m.dim() != 4 for m in masks):
        return False
    if any(kwargs[name] not in (None, False) for name in kwargs.keys() - _ARGUMENTS):
        return False
    # Angles that depend on the length are chosen by the host.
    rope_type = decoder.rotary_emb.rotary.rope_type
    if "dynamic" in rope_type or rope_type == "longrope":
        return False
    return (
        isinstance(cache, Cache)
        and type(cache).update is Cache.update
        and not cache.offloading
        and len(cache.layers) == len(decoder.layers)
        and all(type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers)
        and not torch.cuda.is_current_stream_capturing()
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks but transformers' own, which do nothing in a plain step."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


def _tensors(arguments: dict) -> list[Tensor]:
    """The tensors among a step's arguments, in a fixed order."""
    return [t for t in torch.utils._pytree.tree_leaves(_given(arguments)) if isinstance(t, Tensor)]


def _given(arguments: dict) -> dict:
    names = ("input_ids", "position_ids", "attention_mask")
    return {name: arguments[name] for name in names if name in arguments}


def _with_copies(arguments: dict) -> dict:
    """The arguments with tensors of their own, where a graph may read them."""
    copies = torch.utils._pytree.tree_map_only(Tensor, torch.clone, _given(arguments))
    return {**arguments, **copies}


def _sources(decoder: nn.Module, cache: Cache, inputs: list[Tensor]) -> tuple:
    """Addresses and shapes that must be the same for a graph to be of use."""
    held = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    lengths = [layer.cumulative_length.data_ptr() for layer in cache.layers]
    weights = [layer.self_attn.packed_weight.data_ptr() for layer in decoder.layers]
    kinds = [(t.shape, t.dtype) for t in inputs]
    return (id(decoder), *held, *lengths, *weights, *kinds)
