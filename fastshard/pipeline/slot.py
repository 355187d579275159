"""Slot: one request in flight on one rank, its caches, its static buffers and its graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fastshard.decode import Part, by_device
from fastshard.models import ShardedGeneralModel
from fastshard.nn import KVCache
from fastshard.sampling import Sampling


class Slot:
    """Place for one request after another, one row each; all memory is taken once.

    The models' own caches stay as they are: a slot lends its caches to them for each pass.

    Attributes:
        x: What the next step runs: a token ``[1]`` on the first stage, else ``[1, hidden_size]``.
    """

    def __init__(self, models: Sequence[ShardedGeneralModel], *, context: int, mode: str):
        """Take the memory.

        Args:
            models: Shards in turn, in the order of their layers; whole models on each device.
            context: Tokens that the caches hold.
            mode: ``persistent``, ``graph`` or ``eager``.
        """
        self._models = list(models)
        self._caches = [_new_caches(model, context) for model in models]
        self._sampling = Sampling()
        with self._lent():
            self._parts = [
                Part(
                    part,
                    1,
                    room=context,
                    is_persistent=mode == "persistent",
                    is_captured=mode != "eager",
                )
                for part in by_device(self._models)
            ]
        self.x: Tensor = self._parts[0].x

    def warm_up(self) -> str | None:
        """Run and capture a step of nothing; returns why it is not persistent, if that changed.

        A capture waits for the device, and once requests are in flight the device may wait for
        another rank: so it is done before the first.
        """
        reason = None
        with self._lent():
            for part in self._parts:
                part.begin(0, Sampling())
                while part.will_be_recorded:
                    reason = part.run()[1] or reason
        return reason

    def drop_graphs(self) -> None:
        """Forget what was captured."""
        for part in self._parts:
            part.drop_graph()

    def start(self, sampling: Sampling) -> None:
        """Forget the request before; ``sampling`` is the next one's."""
        self._sampling = sampling

    @torch.no_grad()
    def prefill(self, x: Tensor, start: int, *, is_last: bool) -> Tensor | None:
        """Run the next tokens of the prompt.

        Args:
            x: Tokens ``[1, s]`` on the first stage, else the hidden state ``[1, s, hidden_size]``.
            start: Tokens before them.
            is_last: Whether they end the prompt.

        Returns:
            The hidden state; of the last stage the token that follows the prompt, ``[1]``, or None
            where the prompt goes on.

        Raises:
            ValueError: the caches are full.
        """
        length = x.shape[1]
        with self._lent():
            for model in self._models:
                x = _run_layers(model, x, start)
        if is_last:
            for part in self._parts:
                part.begin(start + length, self._sampling)
        if not self._models[-1].shard.is_last_layer():
            return x
        return self._hand_over(self._parts[-1].choose_first(x[:, -1])) if is_last else None

    @torch.no_grad()
    def step(self) -> Tensor:
        """Run ``x``: the next token ``[1]``, or the hidden state ``[1, hidden_size]``."""
        y = None
        are_recorded = all(part.is_recorded for part in self._parts)
        with nullcontext() if are_recorded else self._lent():
            for part in self._parts:
                if y is not None:
                    part.x.copy_(y, non_blocking=True)
                y, _ = part.run()
        return self._hand_over(y) if self._models[-1].shard.is_last_layer() else y

    def _hand_over(self, token: Tensor) -> Tensor:
        """Of all layers on several devices, the token is the first one's next input."""
        if len(self._parts) > 1 and self._models[0].shard.is_first_layer():
            self.x.copy_(token, non_blocking=True)
        return token

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """The models have this slot's caches."""
        attentions = [_attentions(model) for model in self._models]
        own = [[(attn.kv_cache, attn.cache_enabled) for attn in part] for part in attentions]
        lent = [[(cache, True) for cache in caches] for caches in self._caches]
        _set_caches(attentions, lent)
        try:
            yield
        finally:
            _set_caches(attentions, own)


def _attentions(model: ShardedGeneralModel) -> list:
    return [layer.attn for layer in model.model.layers.values()]


def _set_caches(attentions: list, caches: list) -> None:
    for part, of_part in zip(attentions, caches, strict=True):
        for attn, (cache, is_enabled) in zip(part, of_part, strict=True):
            attn.kv_cache, attn.cache_enabled = cache, is_enabled


def _new_caches(model: ShardedGeneralModel, context: int) -> list[KVCache]:
    """A cache of one row for each layer, beside those that the model has."""
    config = model.config
    return [
        KVCache(1, context, attn.num_kv_heads, config.head_dim, model.dtype, model.device)
        for attn in _attentions(model)
    ]


def _run_layers(model: ShardedGeneralModel, x: Tensor, start: int) -> Tensor:
    """Hidden states, or logits of the last token: ``[1, 1, vocab_size]``."""
    decoder = model.model
    x = x.to(model.device)
    is_first = model.shard.is_first_layer()
    step = decoder.next_step(1, x.shape[1], start)
    if start == 0:
        decoder.reset_caches()
    out = decoder(
        x if is_first else None,
        hidden_state=None if is_first else x,
        step=step,
        num_logits=1,
    )
    decoder.advance(1, x.shape[1])
    return out
