"""What rank 0 tells the other ranks to do, and its form on the way: eight words of 64 bits."""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fastshard.sampling import Sampling

NUM_WORDS = 8


@dataclass(frozen=True)
class Start:
    """Begin another request in ``slot``, whose tokens are chosen by ``sampling``."""

    slot: int
    sampling: Sampling


@dataclass(frozen=True)
class Chunk:
    """Run tokens ``start`` to ``start + num_tokens`` of the slot's prompt.

    Attributes:
        is_last: They end the prompt: the last stage chooses the token that follows.
    """

    slot: int
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True)
class Step:
    """Run the slot's newest token, and choose the one that follows."""

    slot: int


@dataclass(frozen=True)
class Collect:
    """Take the slot's newest token from the last stage; only the ranks of the first stage do."""

    slot: int


@dataclass(frozen=True)
class Stop:
    """There are no more commands.

    Attributes:
        is_failure: Rank 0 stops because something went wrong there.
    """

    is_failure: bool = False


Command = Start | Chunk | Step | Collect | Stop
_KINDS = (Start, Chunk, Step, Collect, Stop)


def to_words(command: Command) -> Tensor:
    """``[NUM_WORDS]`` int64 on the CPU: which command, then its values."""
    if isinstance(command, Start):
        sampling = command.sampling
        floats = (sampling.temperature, sampling.top_p, sampling.min_p)
        values = [command.slot, sampling.top_k, sampling.seed, *map(_bits, floats)]
    else:
        values = [int(value) for value in vars(command).values()]
    words = [_KINDS.index(type(command)), *values]
    return torch.tensor(words + [0] * (NUM_WORDS - len(words)), dtype=torch.int64)


def from_words(words: Tensor) -> Command:
    """Inverse of ``to_words``.

    Raises:
        RuntimeError: the first word is that of no command.
    """
    kind, *values = words.tolist()
    if not 0 <= kind < len(_KINDS):
        raise RuntimeError(f"a command must begin with 0 to {len(_KINDS) - 1}, got {kind}")
    if _KINDS[kind] is Start:
        slot, top_k, seed, *bits = values[:6]
        temperature, top_p, min_p = map(_float, bits)
        return Start(slot, Sampling(temperature, top_k, top_p, min_p, seed))
    if _KINDS[kind] is Chunk:
        return Chunk(*values[:3], is_last=bool(values[3]))
    if _KINDS[kind] is Stop:
        return Stop(bool(values[0]))
    return _KINDS[kind](values[0])


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
