"""What a decoder accepts: each check raises an error that names the argument, the rule, the value.

They look at shapes, dtypes and devices, so they trace under ``torch.compile``; at values only where
that is free, on the CPU.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastshard.nn.rope import token_positions

if TYPE_CHECKING:
    from fastshard.models.decoder import ShardTransformerDecoder


def check_input(
    decoder: "ShardTransformerDecoder", tokens: Tensor | None, hidden_state: Tensor | None
) -> tuple[int, int]:
    """Return (b, s) of the input that this shard takes: tokens on the first, else a hidden state.

    A ring of shards may hand the tokens on to every shard: beside a hidden state they are ignored.

    Raises:
        ValueError: the input is missing, a hidden state is given to the first shard, or shape,
            device or a token is wrong.
        TypeError: the dtype is wrong.
    """
    shard, config = decoder.shard, decoder.config
    is_first = shard.is_first_layer()
    wanted, x = ("tokens", tokens) if is_first else ("hidden_state", hidden_state)
    if x is None or (is_first and hidden_state is not None):
        given = {"tokens": tokens, "hidden_state": hidden_state}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(
            f"{wanted}{' and no hidden_state' if is_first else ''} must be given to layers "
            f"{shard.start_layer} to {shard.end_layer}, got {' and '.join(names) or 'none of them'}"
        )
    if wanted == "tokens":
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {x.dtype}")
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"tokens must be [b, s] of at least one, got {list(x.shape)}")
        check_range("tokens", x, config.vocab_size)
    else:
        if x.dtype != decoder.dtype:
            raise TypeError(f"hidden_state must be {decoder.dtype}, got {x.dtype}")
        if x.dim() != 3 or x.shape[2] != config.hidden_size or x.numel() == 0:
            rule = f"[b, s, {config.hidden_size}]"
            raise ValueError(f"hidden_state must be {rule}, got {list(x.shape)}")
    _check_device(decoder, wanted, x)
    return x.shape[0], x.shape[1]


def check_mask(
    decoder: "ShardTransformerDecoder",
    mask: Tensor | None,
    first_key: Tensor | None,
    b: int,
    s: int,
    num_keys: int,
) -> None:
    """Raise unless ``mask`` is ``[b | 1, s, num_keys or more]`` and ``first_key`` ``[b]``.

    Raises:
        ValueError: a shape or device is wrong.
        TypeError: a dtype is wrong.
    """
    if first_key is not None:
        _check_device(decoder, "first_key", first_key)
        if tuple(first_key.shape) != (b,):
            raise ValueError(f"first_key must have shape [{b}], got {list(first_key.shape)}")
        if first_key.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"first_key must be int64 or int32, got {first_key.dtype}")
    if mask is None:
        return
    _check_device(decoder, "mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating, got {mask.dtype}")
    if mask.dim() != 3 or mask.shape[0] not in (1, b) or mask.shape[1] != s:
        raise ValueError(f"mask must be [1 or {b}, {s}, S], got shape {list(mask.shape)}")
    if mask.shape[2] < num_keys:
        raise ValueError(f"mask must cover all {num_keys} keys, got shape {list(mask.shape)}")


def check_positions(
    decoder: "ShardTransformerDecoder", input_pos: Tensor, b: int, s: int
) -> Tensor:
    """Return ``input_pos`` as ``[b, s]`` or ``[s]`` int64.

    Raises:
        ValueError: shape, device or a position is wrong.
        TypeError: the dtype is wrong.
    """
    _check_device(decoder, "input_pos", input_pos)
    positions = token_positions(input_pos, b, s)
    check_range("input_pos", positions, decoder.max_seq_len)
    return positions


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise unless all are in [0, limit); looks at CPU tensors only, for a GPU would have to wait.

    On a GPU an out-of-range position sets the cache's flag, see ``KVCache.raise_on_overflow``.

    Raises:
        ValueError: one is not.
    """
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return
    low, high = (int(value) for value in torch.aminmax(values))
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {low if low < 0 else high}")


def _check_device(decoder: "ShardTransformerDecoder", name: str, x: Tensor) -> None:
    if x.device != decoder.device:
        raise ValueError(f"{name} must be on {decoder.device}, got {x.device}")
