"""A state of inference as bytes, and as the plain values of exo's dict: both read from strangers.

The bytes, integers little-endian and unsigned:

    offset  bytes  what
    0       4      ``FSIS``
    4       1      version of this format: 1
    5       1      bytes of each integer from offset 20 on: 2 if all are below 65536, else 4
    6       2      flags: 1, there is a first_key; 2, there is an input_pos
    8       4      b, rows
    12      4      s, tokens under way in each row
    16      4      curr_pos
    20             tokens [b, s]; first_key [b], if any; input_pos [b, s], if any

The dict of exo's torch engine has four keys: ``tokens``, all so far, ``[b, T]``; ``curr_pos``;
``input_pos``, ``[1 | b, T or more]``; ``mask``, ``[1 | b, T or more, slots]`` bool, True = attend.
Source: exo-explore/exo, ``exo/inference/torch/models/llm_utils.py``.
"""

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
"""Those of ``ShardInferenceState``, which checks them."""

_MAGIC, _VERSION = b"FSIS", 1
_HEADER = struct.Struct("<4sBBHIII")
_CODES = {2: "H", 4: "I"}  # bytes of an integer -> its code in struct
_FLAGS = {"first_key": 1, "input_pos": 2}  # in the order of the bytes

_REQUIRED, _OPTIONAL = ("tokens", "curr_pos"), ("first_key", "input_pos", "mask")


def to_bytes(tokens: Tensor, curr_pos: int, **optional: Tensor | None) -> bytes:
    """Write the format above; tensors on the host, values below 2**32."""
    given = {name: optional[name] for name in _FLAGS if optional[name] is not None}
    values = torch.cat([x.reshape(-1) for x in (tokens, *given.values())]).tolist()
    flags = sum(_FLAGS[name] for name in given)
    width = 2 if max(values) < 2**16 else 4
    header = _HEADER.pack(_MAGIC, _VERSION, width, flags, *tokens.shape, curr_pos)
    return header + struct.pack(f"<{len(values)}{_CODES[width]}", *values)


def from_bytes(data: bytes | bytearray | memoryview) -> Arguments:
    """Read the format above. Allocates no more than the bytes themselves ask for.

    Raises:
        ValueError: cut off, too many, of another version, or not this format at all.
        TypeError: ``data`` is not bytes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    data = bytes(data)
    if len(data) < _HEADER.size:
        raise ValueError(f"data must be at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, width, flags, b, s, curr_pos = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"data must begin with {_MAGIC}, got {magic}")
    if version != _VERSION:
        raise ValueError(f"data must be of version {_VERSION} of the format, got {version}")
    if width not in _CODES:
        raise ValueError(f"integers of data must have 2 or 4 bytes, got {width}")
    if flags > sum(_FLAGS.values()):
        raise ValueError(f"flags of data must be in [0, {sum(_FLAGS.values())}], got {flags}")
    if b * s == 0:
        raise ValueError(f"data must have at least one token, got {b} rows of {s}")
    shapes = {"tokens": (b, s)}
    if flags & _FLAGS["first_key"]:
        shapes["first_key"] = (b,)
    if flags & _FLAGS["input_pos"]:
        shapes["input_pos"] = (b, s)
    counts = [b if len(shape) == 1 else b * s for shape in shapes.values()]
    size = _HEADER.size + width * sum(counts)
    if len(data) != size:
        raise ValueError(f"data of {b} rows of {s} tokens must be {size} bytes, got {len(data)}")
    values = struct.unpack_from(f"<{sum(counts)}{_CODES[width]}", data, _HEADER.size)
    parts = torch.tensor(values).split(counts)
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.view(shape) for (name, shape), part in named} | {"curr_pos": curr_pos}


def to_dict(tokens: Tensor, curr_pos: int, **optional: Tensor | None) -> dict[str, Any]:
    """Return nested lists and an int, under exo's keys; no mask."""
    tensors = {"tokens": tokens} | {k: x for k, x in optional.items() if x is not None}
    return {name: x.tolist() for name, x in tensors.items()} | {"curr_pos": curr_pos}


def from_dict(data: Mapping[str, Any]) -> Arguments:
    """Read what ``to_dict`` gave, or exo's dict: that which has a mask.

    Raises:
        ValueError: keys are missing or unknown, values are no arrays, or the mask is none that
            follows from a ``first_key``.
        TypeError: the mask is not bool.
    """
    if not set(_REQUIRED) <= set(data) <= {*_REQUIRED, *_OPTIONAL}:
        raise ValueError(
            f"a state must have the keys {', '.join(_REQUIRED)}, and at most "
            f"{', '.join(_OPTIONAL)}, got {', '.join(map(str, data)) or 'none'}"
        )
    arguments = {
        name: value if name == "curr_pos" else _array(name, value)
        for name, value in data.items()
        if value is not None or name in _REQUIRED
    }
    return _of_exo(**arguments) if "mask" in arguments else arguments


def _array(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be nested lists of numbers, got {value!r:.60}") from error


def _of_exo(
    tokens: Tensor,
    curr_pos: int,
    mask: Tensor,
    input_pos: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Arguments:
    """Cut out the tokens from ``curr_pos`` on: exo's dict holds the whole sequence."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [b, T] beside a mask, got {list(tokens.shape)}")
    b, end = tokens.shape
    if not isinstance(curr_pos, int):
        raise TypeError(f"curr_pos must be an integer, got {curr_pos!r}")
    if not 0 <= curr_pos < end:
        raise ValueError(f"curr_pos must be in [0, {end}) for tokens beside a mask, got {curr_pos}")
    if input_pos is not None:
        if input_pos.dim() != 2 or input_pos.shape[1] < end:
            raise ValueError(
                f"input_pos must be [1 or {b}, {end} or more] beside a mask, "
                f"got {list(input_pos.shape)}"
            )
        input_pos = input_pos[:, curr_pos:end]
    padding = _padding(mask, b, end)
    if first_key is not None and first_key.tolist() != padding.tolist():
        raise ValueError(
            f"first_key must be that of the mask, {padding.tolist()}, got {first_key.tolist()}"
        )
    return {
        "tokens": tokens[:, curr_pos:],
        "curr_pos": curr_pos,
        "first_key": padding,
        "input_pos": input_pos,
    }


def _padding(mask: Tensor, b: int, end: int) -> Tensor:
    """``[b]``, the first key that the last of ``end`` tokens may attend to.

    What padding itself attends to is of no account: torchtune's helper lets it attend to itself.

    Raises:
        ValueError: the mask is not causal from there on: it would be lost on the way.
        TypeError: it is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() != 3 or mask.shape[0] not in (1, b) or min(mask.shape[1:]) < end:
        raise ValueError(
            f"mask must be [1 or {b}, {end} or more, {end} or more], got {list(mask.shape)}"
        )
    mask = mask[:, :end]
    first_key = mask[:, -1].int().argmax(-1)  # [1 | b]
    i, j = torch.arange(end)[:, None], torch.arange(mask.shape[2])
    expected = (j <= i) & (j >= first_key[:, None, None])
    wrong = ((mask != expected) & (i >= first_key[:, None, None])).nonzero()
    if len(wrong):
        row, query, key = wrong[0].tolist()
        raise ValueError(
            "mask must be causal but for padding on the left: no other one travels, "
            f"got {mask[row, query, key].item()} at [{row}, {query}, {key}]"
        )
    return first_key.expand(b)
