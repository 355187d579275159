"""Arguments and answers of a function in files: tensors as safetensors, the rest as JSON.

No file of these can run code when it is read, whoever wrote it: a distrusted process's answer is
read as safely as an argument.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))
Take = Callable[[Tensor], Tensor]


@dataclass
class Packed:
    """A value as buffers and what is made of them.

    Attributes:
        tree: JSON of the value; a tensor is the number of its buffer, its shape and strides.
        buffers: Contiguous, one-dimensional: all elements between a tensor's first and its last.
    """

    tree: object
    buffers: list[Tensor] = field(default_factory=list)

    def value(self) -> object:
        """What was packed, its tensors views of the buffers."""
        return _value(self.tree, self.buffers)


def pack(value: object, take: Take = torch.clone) -> Packed:
    """Take a value apart.

    Args:
        value: Of tensors, numbers, texts, None, and lists, tuples and dicts of them.
        take: Makes a buffer of a view of a tensor's elements; by default a copy.

    Raises:
        TypeError: something else is in it.
    """
    packed = Packed(None)
    packed.tree = _tree(value, packed.buffers, take)
    return packed


def save(path: Path, packed: Packed) -> None:
    """Write it. The buffers may be on any device."""
    buffers = {str(i): buffer.cpu() for i, buffer in enumerate(packed.buffers)}
    save_file(buffers, path, metadata={"tree": json.dumps(packed.tree)})


def load(path: Path) -> Packed:
    """Read what ``save`` wrote, onto the CPU.

    Raises:
        ValueError: the file is none, or does not fit together.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            names = list(file.keys())
            packed = Packed(tree, [file.get_tensor(str(i)) for i in range(len(names))])
        packed.value()  # whose shapes must lie within the buffers
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no file of arguments: {error}") from None
    except RuntimeError as error:  # of strides, and what is too deep
        raise ValueError(f"{path.name} is no file of arguments: {error}") from None
    return packed


def tensors_of(value: object) -> list[Tensor]:
    """All tensors of a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for each in value.values() for one in tensors_of(each)]
    if isinstance(value, list | tuple):
        return [one for each in value for one in tensors_of(each)]
    return []


def map_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """The value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(each, change) for each in value)
    return value


def shapes_of(value: object) -> list[list[int]]:
    """Of all tensors of a value."""
    return [list(tensor.shape) for tensor in tensors_of(value)]


def _tree(value: object, buffers: list[Tensor], take: Take) -> object:
    if isinstance(value, Tensor):
        tensor = value.detach()
        strides = list(tensor.stride())
        if any(stride < 0 for stride in strides) or tensor.layout != torch.strided:
            raise TypeError(f"a tensor must be strided, got {tensor.layout}")
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
        flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
        buffers.append(take(flat))
        return {"tensor": len(buffers) - 1, "shape": list(tensor.shape), "strides": strides}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if isinstance(value, torch.nn.ParameterDict):
        value = dict(value.items())
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _tree(each, buffers, take) for name, each in value.items()}}
    if isinstance(value, list | torch.nn.ParameterList):
        return {"list": [_tree(each, buffers, take) for each in value]}
    if isinstance(value, tuple):
        return {"tuple": [_tree(each, buffers, take) for each in value]}
    raise TypeError(f"an argument must be of tensors and plain values, got {type(value).__name__}")


def _value(tree: object, buffers: list[Tensor]) -> object:
    ((kind, content),) = ((k, v) for k, v in tree.items() if k not in ("shape", "strides"))
    if kind == "tensor":
        if content not in range(len(buffers)):
            raise ValueError(f"there is no buffer {content}")
        return buffers[content].as_strided(tree["shape"], tree["strides"])
    if kind == "plain":
        return content
    if kind == "dict":
        return {name: _value(each, buffers) for name, each in content.items()}
    if kind not in ("list", "tuple"):
        raise ValueError(f"there is no kind {kind!r}")
    made = [_value(each, buffers) for each in content]
    return tuple(made) if kind == "tuple" else made
