"""Which tensor of a checkpoint lies in which file; only files that are asked for are opened."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.source import Source
from fastshard.checkpoint.tensor_files import SafetensorsFile, TensorFile, TorchFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightIndex:
    """Tensor name -> file, read from the index where there is one, else from the files' headers.

    Attributes:
        file_names: Tensor name -> name of its file.
        where: What says so, for messages: the path of the index or of the only file.

    Raises:
        CheckpointError: no weights, a corrupt index, or one name in two files.
    """

    def __init__(self, source: Source):
        self._source = source
        self._files: dict[str, TensorFile] = {}
        self.file_names: dict[str, str] = {}
        index = source.find(_INDEX)
        if index is not None:
            self.where = str(index)
            self.file_names = _read_index(index)
            return
        names = [_SINGLE] if source.find(_SINGLE) else source.list(".safetensors")
        names = names or source.list(".pt")
        if not names:
            raise CheckpointError(
                f"{source.name}: must have {_INDEX}, {_SINGLE}, *.safetensors or *.pt, got none"
            )
        for name in names:
            for tensor in self._open(name).tensors:
                if tensor in self.file_names:
                    raise CheckpointError(
                        f"{source.name}: {tensor} is in {self.file_names[tensor]} and in {name}"
                    )
                self.file_names[tensor] = name
        self.where = str(self._open(names[0]).path) if len(names) == 1 else source.name

    def file_of(self, tensor: str) -> TensorFile:
        """The file that the index names for this tensor, opened and found to hold it.

        Raises:
            CheckpointError: the file is missing, corrupt, or does not hold the tensor.
        """
        file = self._open(self.file_names[tensor])
        if tensor not in file.tensors:
            raise CheckpointError(f"{file.path}: {tensor} is missing, though {self.where} lists it")
        return file

    def fetch(self, tensors: Iterable[str]) -> None:
        """Make the files of these tensors local, before the first is read."""
        for name in sorted({self.file_names[tensor] for tensor in tensors}):
            self._open(name)

    def describe(self) -> dict[str, str | None]:
        """Shape, dtype, bytes and a sample's digest of every tensor by name, as one text.

        Of another checkpoint of the same model, like a finetuned one, it differs. Of each tensor
        no more is read than the sample. None for a tensor whose file is not local: none is
        fetched, and each process may hold only the files that it needs.
        """
        local = {name for name in set(self.file_names.values()) if self._source.local(name)}
        return {
            tensor: _describe(self._open(name), tensor) if name in local else None
            for tensor, name in sorted(self.file_names.items())
        }

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            path = self._source.find(name)
            if path is None:
                raise CheckpointError(
                    f"{self._source.name}: {name} is missing, which holds tensors"
                )
            self._files[name] = TorchFile(path) if name.endswith(".pt") else SafetensorsFile(path)
        return self._files[name]


def _describe(file: TensorFile, tensor: str) -> str:
    if tensor not in file.tensors:
        return "missing"
    digest = hashlib.sha256(file.sample(tensor)).hexdigest()[:8]
    return f"{file.tensors[tensor]}, sample {digest}"


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: must be JSON with a weight_map, got {error!r}") from error
    names = weight_map.items() if isinstance(weight_map, dict) else [(None, None)]
    for tensor, file in names:
        # A file name, not a path: an index must not reach out of its checkpoint.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path}: weight_map must map each tensor to a file name, got {tensor}: {file!r}"
            )
    return weight_map
