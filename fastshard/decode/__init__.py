"""Decoding: the steps after the prompt, one token a row each, in one of three modes.

``eager`` calls the layers for every token. ``persistent`` (one launch a shard, ``ops.decode_step``)
and ``graph`` (the layers' own ops) run over static buffers, all counts on the device, so that on a
GPU a step is one replay of a CUDA graph: no Python, no allocation, no wait.
"""

from typing import Protocol

import torch
from torch import Tensor

from fastshard.decode.modes import (
    MODES,
    WholeModel,
    check_mode,
    choose_mode,
    shards_of,
    warn_of_fallback,
)
from fastshard.decode.prompts import PromptGraphs
from fastshard.decode.shard_step import decode_weights
from fastshard.decode.static import Part, StaticDecoding, by_device, capture
from fastshard.sampling import Sampling

__all__ = [
    "MODES",
    "Decoding",
    "EagerDecoding",
    "Part",
    "PromptGraphs",
    "StaticDecoding",
    "WholeModel",
    "by_device",
    "capture",
    "check_mode",
    "choose_mode",
    "decode_weights",
    "shards_of",
    "start_decoding",
    "warn_of_fallback",
]


class Decoding(Protocol):
    """One prompt's decoding.

    Attributes:
        mode: ``persistent``, ``graph`` or ``eager``.
    """

    mode: str

    def step(self) -> Tensor:
        """Launch the next step; returns its tokens, ``[b]`` on the last shard's device.

        They stay as they are when later steps are launched, and nothing waits for them.

        Raises:
            ValueError: the cache is full.
            RuntimeError: the cache holds another prompt.
        """


def start_decoding(
    model: WholeModel,
    tokens: Tensor,
    *,
    num_held: int,
    sampling: Sampling,
    first_key: Tensor | None = None,
    mode: str = "auto",
) -> Decoding:
    """Prepare to go on after a prompt that ``model.generate`` has run.

    Weights are read where they are: one decoding serves one prompt, and a model that is moved needs
    another. A mode that cannot run falls back, with one warning that says why.

    Args:
        model: All layers, with caches that hold the prompt.
        tokens: ``[b]`` int64, the first ones after the prompt.
        num_held: Tokens in the caches.
        sampling: How the next ones are chosen: the first step is draw 1.
        first_key: As it was given for the prompt.
        mode: One of ``MODES``.
    """
    models = shards_of(model)
    chosen, reason = choose_mode(mode, models, len(tokens))
    if reason is not None:
        warn_of_fallback("persistent" if mode == "auto" else mode, chosen, reason)
    if chosen == "eager":
        return EagerDecoding(model, tokens, num_held, sampling, first_key)
    return StaticDecoding(models, tokens, num_held, sampling, first_key, chosen == "persistent")


class EagerDecoding:
    """``model.generate`` for every token."""

    mode = "eager"

    def __init__(
        self,
        model: WholeModel,
        tokens: Tensor,
        num_held: int,
        sampling: Sampling,
        first_key: Tensor | None,
    ):
        self._model = model
        self._tokens = tokens
        self._num_held = num_held
        self._sampling = sampling
        self._first_key = first_key
        self._draw = torch.zeros((), dtype=torch.int64, device=tokens.device)

    def step(self) -> Tensor:
        _, logits = self._model.generate(
            self._tokens[:, None].to(self._model.device),
            curr_pos=self._num_held,
            first_key=self._first_key,
            num_logits=1,
        )
        self._num_held += 1
        self._draw = self._draw + 1
        self._tokens = self._sampling.choose(logits[:, -1], self._draw)
        return self._tokens
