"""ShardInferenceState: what travels beside a hidden state round a ring that is not fastshard's.

A node of such a ring gets a hidden state and this, runs its shard, and hands both on. Of the
sequence only the tokens under way travel: the shards' caches hold those before, and the causal
mask and the positions follow from ``curr_pos`` and ``first_key``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastshard.models import state_format
from fastshard.models.inputs import check_range
from fastshard.models.model import ShardedGeneralModel
from fastshard.nn.rope import token_positions

_LIMIT = 2**31  # tokens, places and positions are below: int32 holds them


@dataclass(frozen=True, eq=False)
class ShardInferenceState:
    """The tokens that are under way round a ring of shards, and their place in the sequence.

    It lives on the host: ``run`` takes it to the shard's device. A ``first_key`` of zeros and an
    ``input_pos`` as counted become None, so that states that mean the same are equal.

    Attributes:
        tokens: ``[b, s]`` int64: a prompt, a piece of one, or one token a row.
        curr_pos: Index in the sequence of the first of them: as many are in the caches.
        first_key: ``[b]`` int64, keys before it are padding on the left. None: there is none.
        input_pos: ``[b, s]`` int64 positions for RoPE. None: counted from ``curr_pos``, without
            the padding.

    Raises:
        ValueError: a shape or value is wrong.
        TypeError: a type or dtype is wrong: tensors are int64 or int32, on any device.
    """

    tokens: Tensor
    curr_pos: int = 0
    first_key: Tensor | None = None
    input_pos: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, first_key, input_pos = self.tokens, self.first_key, self.input_pos
        tokens = _on_host("tokens", tokens)
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be [b, s] of at least one, got {list(tokens.shape)}")
        b, s = tokens.shape
        if not isinstance(self.curr_pos, int) or isinstance(self.curr_pos, bool):
            raise TypeError(f"curr_pos must be an integer, got {self.curr_pos!r}")
        if not 0 <= self.curr_pos <= _LIMIT - s:
            raise ValueError(f"curr_pos must be in [0, {_LIMIT - s}], got {self.curr_pos}")
        if first_key is not None:
            first_key = _on_host("first_key", first_key)
            if tuple(first_key.shape) != (b,):
                raise ValueError(f"first_key must have shape [{b}], got {list(first_key.shape)}")
            first_key = first_key if first_key.any() else None
        if input_pos is not None:
            input_pos = token_positions(_on_host("input_pos", input_pos), b, s).expand(b, s)
            counted = torch.arange(self.curr_pos, self.curr_pos + s)
            if first_key is not None:
                counted = (counted - first_key[:, None]).clamp(min=0)
            input_pos = None if (input_pos == counted).all() else input_pos
        for name, value in (("tokens", tokens), ("first_key", first_key), ("input_pos", input_pos)):
            if value is not None:
                check_range(name, value, _LIMIT)
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardInferenceState):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    def run(
        self,
        model: ShardedGeneralModel,
        hidden_state: Tensor | None = None,
        *,
        num_logits: int | None = 1,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run a shard over the tokens under way: one hop, by ``ShardedGeneralModel.generate``.

        Values are checked against the model on the host: a GPU would stop at them, or wait.

        Args:
            model: A shard. With a cache it holds the ``curr_pos`` tokens before these.
            hidden_state: ``[b, s, hidden_size]``, what the shard before returned, in the model's
                dtype, on any device; None for a first shard.
            num_logits: Logits of this many last tokens only; None: of all.

        Returns:
            ``(hidden, None)``, for the next shard; of the last one ``(None, logits)``.

        Raises:
            ValueError: state, hidden state and model do not fit, or the cache is full.
            TypeError: the hidden state's dtype is not the model's.
        """
        check_range("tokens", self.tokens, model.config.vocab_size)
        for name in ("first_key", "input_pos"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), model.config.max_seq_len)
        if self.curr_pos > 0 and not (model.use_cache or model.model.caches_are_enabled()):
            raise ValueError(
                "curr_pos must be 0 for a shard without a cache, which runs over all tokens each "
                f"time, got {self.curr_pos}"
            )
        if hidden_state is not None and hidden_state.shape[:2] != self.tokens.shape:
            raise ValueError(
                f"hidden_state must be of the state's tokens, {list(self.tokens.shape)}, "
                f"got {list(hidden_state.shape)}"
            )

        def placed(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(model.device)

        return model.generate(
            placed(self.tokens) if model.shard.is_first_layer() else None,
            input_pos=placed(self.input_pos),
            hidden_state=placed(hidden_state),
            curr_pos=self.curr_pos,
            first_key=placed(self.first_key),
            num_logits=num_logits,
        )

    def advance(self, tokens: Tensor) -> "ShardInferenceState":
        """Return the state of ``tokens``, ``[b, s]``, after all shards have run over this one's.

        They are the next token of each row, or the next piece of the prompt. Positions count on.

        Raises:
            ValueError: not as many rows, or as the constructor.
            TypeError: as the constructor.
        """
        tokens, positions = self._next(tokens)
        place = self.curr_pos + self.tokens.shape[1]
        return ShardInferenceState(tokens, place, self.first_key, positions)

    def append(self, tokens: Tensor) -> "ShardInferenceState":
        """Return the state of this one's tokens and ``tokens``, ``[b, s]``.

        For shards without a cache (``use_cache=False``): all tokens go round each time.

        Raises:
            ValueError: not as many rows, or as the constructor.
            TypeError: as the constructor.
        """
        tokens, positions = self._next(tokens)
        if positions is not None:
            positions = torch.cat([self.input_pos, positions], dim=1)
        tokens = torch.cat([self.tokens, tokens], dim=1)
        return ShardInferenceState(tokens, self.curr_pos, self.first_key, positions)

    def _next(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """``tokens``, checked, and their positions, ``[b, s]``, or None where they are counted."""
        tokens = _on_host("tokens", tokens)
        b = self.tokens.shape[0]
        if tokens.dim() != 2 or tokens.shape[0] != b:
            raise ValueError(f"tokens must be [{b}, s], got {list(tokens.shape)}")
        if self.input_pos is None:
            return tokens, None
        return tokens, self.input_pos[:, -1:] + torch.arange(1, tokens.shape[1] + 1)

    def to_bytes(self) -> bytes:
        """Return 20 bytes, and 2 (values below 65536) or 4 for each integer of the tensors.

        A decode step of one row takes 24 bytes at most, 28 with padding, however long the sequence
        is. ``fastshard/models/state_format.py`` has the format.
        """
        return state_format.to_bytes(**vars(self))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "ShardInferenceState":
        """Inverse of ``to_bytes``; the bytes may be a stranger's: nothing in them is executed.

        Raises:
            ValueError: cut off, too many, of another version, or values out of their range.
            TypeError: ``data`` is not bytes.
        """
        return cls(**state_format.from_bytes(data))

    def to_dict(self) -> dict[str, Any]:
        """Return exo's keys ``tokens`` and ``curr_pos``, where needed ``first_key``, ``input_pos``.

        Values are ints and nested lists of them, which JSON can hold. There is no ``mask``, and
        ``tokens`` are those under way.
        """
        return state_format.to_dict(**vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShardInferenceState":
        """Inverse of ``to_dict``; takes the dict of exo's torch engine, too.

        That one has a ``mask``, and its ``tokens`` are the whole sequence: those from ``curr_pos``
        on are under way. The mask becomes ``first_key``.

        Raises:
            ValueError: keys are missing or unknown, a shape or value is wrong, or the mask is
                another one than causal with padding on the left.
            TypeError: a type or dtype is wrong.
        """
        return cls(**state_format.from_dict(data))


def _on_host(name: str, x: Tensor) -> Tensor:
    """A copy as int64 on the CPU: what the caller writes into ``x`` later does not change it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {x.dtype}")
    return x.detach().to("cpu", torch.int64, copy=True)
