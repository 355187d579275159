"""Decoders that replay single tokens over a static cache from a CUDA graph.

A step costs the host the launch of some hundred kernels, or the replay of one graph. The first
token over a cache runs as it is, which is also what a capture needs before it; the second is
captured; from then on inputs are copied to where the graph reads them. Whatever is not plain
decoding (another cache, several tokens, outputs to be recorded, hooks, a compiler) runs as before.
"""

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from fastshard.decode.modes import is_gpu
from fastshard.decode.static import capture
from fastshard.integrations.transformers.attention import NAME

_ARGUMENTS = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache"}
# Of each cache in use; neither is kept alive, nor copied with a model.
_steps: "weakref.WeakKeyDictionary[Cache, _Step]" = weakref.WeakKeyDictionary()


def use_graphs(decoder: nn.Module) -> None:
    """Let ``decoder`` replay its steps: an instance's ``forward`` goes before its class's."""
    decoder.__dict__["forward"] = types.MethodType(forward, decoder)


def use_no_graphs(decoder: nn.Module) -> None:
    """Take back ``use_graphs``."""
    del decoder.__dict__["forward"]


def forward(decoder: nn.Module, input_ids: Tensor | None = None, *args, **kwargs):
    """As ``forward`` of the decoder's class. Of its name: pickle finds a method by it."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if args or not _is_plain_step(decoder, input_ids, cache, kwargs):
        return type(decoder).forward(decoder, input_ids, *args, **kwargs)
    step = _steps.get(cache)
    if step is None:
        step = _steps[cache] = _Step()
    return step.run(decoder, cache, {"input_ids": input_ids, **kwargs})


class _Step:
    """The next token over one static cache."""

    def __init__(self):
        self._sources: tuple | None = None  # what a graph holds the addresses of
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._result: Any = None
        self._hidden: Tensor | None = None
        self._held: list[Tensor] = []

    def run(self, decoder: nn.Module, cache: Cache, arguments: dict):
        """Run the class's ``forward``, by its graph from the second time on."""
        inputs = _tensors(arguments)
        sources = _sources(decoder, cache, inputs)
        if sources != self._sources:  # a first token, a reordered cache, a moved model
            self._sources, self._replay = sources, None
            return type(decoder).forward(decoder, **arguments)
        if self._replay is None and any(_has_hooks(module) for module in decoder.modules()):
            return type(decoder).forward(decoder, **arguments)
        if self._replay is None:
            self._capture(decoder, arguments)
        else:
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given)
        self._replay()
        name = "cache" if "cache" in arguments else "past_key_values"
        # The next step overwrites what the graph wrote.
        return self._result(last_hidden_state=self._hidden.clone(), **{name: cache})

    def _capture(self, decoder: nn.Module, arguments: dict) -> None:
        with torch.inference_mode(False):  # later steps may be outside of it
            arguments = _with_copies(arguments)
        self._inputs = _tensors(arguments)
        # The graph reads them, also if the model is moved meanwhile: nothing else may lie there.
        self._held = [t.detach() for t in (*decoder.parameters(), *decoder.buffers())]

        def launch() -> None:
            out = type(decoder).forward(decoder, **arguments)
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
    if kwargs.get("use_cache") is False or any(
        kwargs[name] not in (None, False) for name in kwargs.keys() - _ARGUMENTS
    ):
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
