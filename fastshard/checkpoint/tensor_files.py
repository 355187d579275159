"""Tensor files: what each holds and rows of one tensor at a time, by plain reads.

Not memory-mapped: pages of a mapped file count as resident memory for as long as it is mapped, and
a loader that promises a small peak could not keep it.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastshard.checkpoint.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
SAMPLE_BYTES = 64


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and, in a safetensors file, the half-open range of bytes after the header.

    ``dtype`` is None where the file names one that holds no plain floating-point numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    begin: int = 0
    end: int = 0

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{list(self.shape)} of another type, {self.end - self.begin} bytes"
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return f"{list(self.shape)} {self.dtype}, {num_bytes} bytes"


class TensorFile(Protocol):
    """What the loader needs of a file."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read_rows(
        self, name: str, start: int, stop: int, columns: range | None = None
    ) -> Tensor: ...

    def sample(self, name: str) -> bytes: ...


class SafetensorsFile:
    """One safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes.

    Raises:
        CheckpointError: the header is corrupt, or a tensor's bytes do not lie inside the file or
            do not fit its shape.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._buffer = bytearray()
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: corrupt safetensors header, its length must be 2 to {size - 8} "
                    f"bytes in a file of {size}, got {length}"
                )
            header = file.read(length)
        self._data_start = 8 + length
        self.tensors = _parse_header(path, header, size - self._data_start)

    def read_rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` (along the first dim), valid until the next call.

        Args:
            columns: Of a matrix: only these are read; None: all.
        """
        info = self.tensors[name]
        itemsize = info.dtype.itemsize
        row_bytes = math.prod(info.shape[1:]) * itemsize
        shape = (stop - start, *(info.shape[1:] if columns is None else (len(columns),)))
        num_bytes = math.prod(shape) * itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=info.dtype)
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        target = memoryview(self._buffer)[:num_bytes]
        offset = self._data_start + info.begin + start * row_bytes
        piece_bytes = num_bytes  # that lie behind each other in the file
        if columns is not None:
            offset += columns.start * itemsize
            piece_bytes = len(columns) * itemsize
        with self.path.open("rb", buffering=0) as file:
            for piece in range(0, num_bytes, piece_bytes):
                self._read(file.fileno(), name, offset, target[piece : piece + piece_bytes])
                offset += row_bytes
        flat = torch.frombuffer(self._buffer, dtype=info.dtype, count=math.prod(shape))
        return flat.view(shape)

    def sample(self, name: str) -> bytes:
        """The bytes in the middle of a tensor, at most ``SAMPLE_BYTES``."""
        info = self.tensors[name]
        sample = bytearray(min(SAMPLE_BYTES, info.end - info.begin))
        middle = (info.begin + info.end - len(sample)) // 2
        with self.path.open("rb", buffering=0) as file:
            self._read(file.fileno(), name, self._data_start + middle, memoryview(sample))
        return bytes(sample)

    def _read(self, file: int, name: str, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on."""
        while len(target):
            count = os.preadv(file, [target], offset)
            if not count:
                raise CheckpointError(f"{self.path}: {name} ends early, the file was truncated")
            target = target[count:]
            offset += count


def _parse_header(path: Path, header: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor_info(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header, {error!r}") from error
    for name, info in tensors.items():
        if info.end > data_bytes:
            raise CheckpointError(
                f"{path}: {name} is truncated, its bytes end at {info.end}, "
                f"the file's data at {data_bytes}"
            )
        if info.dtype is None:
            continue
        expected = math.prod(info.shape) * info.dtype.itemsize
        if info.end - info.begin != expected:
            raise CheckpointError(
                f"{path}: {name} of shape {list(info.shape)} and {info.dtype} must have "
                f"{expected} bytes, got {info.end - info.begin}"
            )
    return tensors


def _tensor_info(entry: dict) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError(f"shape {list(shape)}, data_offsets {[begin, end]}")
    return TensorInfo(shape, _DTYPES.get(entry["dtype"]), begin, end)


class TorchFile:
    """One file of ``torch.save``: a flat state dict, memory-mapped, no code executed.

    Raises:
        CheckpointError: it does not hold a dict of tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise CheckpointError(f"{path}: no state dict, {str(error).splitlines()[0]}") from error
        except Exception as error:  # pickle's own
            raise CheckpointError(f"{path}: no plain state dict, {type(error).__name__}") from error
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise CheckpointError(f"{path}: must hold a flat dict of tensors, got {type(state)}")
        self._state = state
        floating = set(_DTYPES.values())
        self.tensors = {
            name: TensorInfo(tuple(t.shape), t.dtype if t.dtype in floating else None)
            for name, t in state.items()
        }

    def read_rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` (along the first dim), of a matrix only ``columns``."""
        rows = self._state[name][start:stop]
        return rows if columns is None else rows[:, columns.start : columns.stop]

    def sample(self, name: str) -> bytes:
        """The bytes in the middle of a tensor, at most ``SAMPLE_BYTES``; none of another type."""
        if self.tensors[name].dtype is None:
            return b""
        raw = self._state[name].reshape(-1).view(torch.uint8)
        count = min(SAMPLE_BYTES, len(raw))
        start = (len(raw) - count) // 2
        return bytes(raw[start : start + count].tolist())
