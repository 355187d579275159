"""Linear layers: one alone, and several over the same input whose weights are one tensor.

``PackedLinears`` is why no weight is copied, cast or concatenated in a forward pass: the ops read
the packed tensor, and the parameters that a state dict sees are views of its rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastshard import ops


def random_weight(
    out_features: int,
    in_features: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """``[out_features, in_features]``, normal: outputs are as large as inputs."""
    weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
    # On meta there are no values, and PyTorch would import its compiler to draw none: 1.3 s.
    return weight if weight.is_meta else weight.normal_(std=in_features**-0.5)


class Linear(nn.Module):
    """``x @ weight.T + bias``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Take ``weight``, ``[out_features, in_features]``, and ``bias``, ``[out_features]``."""
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map ``x``, ``[..., in_features]``, to ``[..., out_features]``, plus ``residual``."""
        return ops.linear(x, self.weight, self.bias, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class _LinearView(Linear):
    """A linear layer whose parameters are rows of its parent's packed tensors.

    It moves and casts with the parent only. Assigning to a parameter writes through.
    """

    def _apply(self, fn, recurse=True):
        return self

    def __setattr__(self, name, value):
        bound = self.__dict__.get("_parameters", {}).get(name)
        if bound is None or not isinstance(value, Tensor) or self.__dict__.get("_is_loading"):
            super().__setattr__(name, value)
            return
        if value.shape != bound.shape:
            raise ValueError(f"{name} must have shape {list(bound.shape)}, got {list(value.shape)}")
        bound.data.copy_(value)

    def _load_from_state_dict(self, *args, **kwargs):
        self.__dict__["_is_loading"] = True  # assign=True replaces parameters; the parent repacks
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.__dict__["_is_loading"]


class PackedLinears(nn.Module):
    """Base of a module that computes several of its linear layers at once.

    Attributes:
        packed_weight: ``[sum of out_features, in_features]``; no parameter itself. Its rows are the
            weights of the named children, which stay views of it through ``.to()`` and the like,
            ``load_state_dict`` (``assign=True`` too), ``deepcopy`` and pickling.
        packed_bias: ``[sum of out_features]`` or None.
    """

    packed_weight: Tensor
    packed_bias: Tensor | None

    def pack(
        self,
        out_features: dict[str, int],
        in_features: int,
        *,
        bias: bool = False,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the packed tensors, random, and the children that are views of them.

        Args:
            out_features: Name of each child -> its rows.
            in_features: Columns.
            bias: Whether the children have one.
            interleaved: Row i of every child, then row i + 1 (all children of one size); else one
                child's rows after the other's.
            device: By default PyTorch's.
            dtype: By default PyTorch's.
        """
        total = sum(out_features.values())
        weight = random_weight(total, in_features, device, dtype)
        self._hold(out_features, weight, weight.new_zeros(total) if bias else None, interleaved)

    def adopt(self, layers: Mapping[str, nn.Module], *, interleaved: bool = False) -> None:
        """Pack existing linear layers: their parameters become views of the packed tensors.

        The children are modules of their own, with parameters of their own over the same memory:
        nothing is kept twice, and at most one copy of these layers' weights is made on the way.

        Args:
            layers: Name of each child -> a layer with ``weight``, ``[out_features, in_features]``,
                and ``bias``, ``[out_features]`` or None. They are of one device, dtype and
                in_features; none has a bias, or all have.
            interleaved: As in ``pack``.

        Raises:
            ValueError: the layers differ.
        """
        first, *rest = layers.items()
        for name, layer in rest:
            if (kind := _kind(layer)) != _kind(first[1]):
                raise ValueError(f"{name} must be like {first[0]}, {_kind(first[1])}, got {kind}")
        rows = {name: layer.weight.shape[0] for name, layer in layers.items()}
        if interleaved and len(set(rows.values())) > 1:
            raise ValueError(f"interleaved layers must be of one size, got {rows}")
        total, like = sum(rows.values()), first[1].weight.detach()
        bias = None if first[1].bias is None else like.new_empty(total)
        self._hold(rows, like.new_empty(total, like.shape[1]), bias, interleaved)
        for child, layer in layers.items():
            for name, view in self._modules[child].named_parameters():
                parameter = getattr(layer, name)
                view.copy_(parameter.detach())
                parameter.data = view.data

    def _hold(
        self, rows: Mapping[str, int], weight: Tensor, bias: Tensor | None, interleaved: bool
    ) -> None:
        """Take the packed tensors and make the children, views of them."""
        self.packed_weight, self.packed_bias = weight, bias
        self._packed_rows: dict[str, slice] = {}
        start = 0
        for index, (name, size) in enumerate(rows.items()):
            part = slice(index, None, len(rows)) if interleaved else slice(start, start + size)
            self._packed_rows[name] = part
            start += size
            child_bias = None if bias is None else bias[part]
            self.add_module(name, _LinearView(weight[part], child_bias))
        self.register_load_state_dict_post_hook(_repack_after_load)

    def _views(self):
        """Yield child, name of its parameter, and the rows of the packed tensor it should be."""
        for name, rows in self._packed_rows.items():
            child = self._modules[name]
            yield child, "weight", self.packed_weight[rows]
            if self.packed_bias is not None:
                yield child, "bias", self.packed_bias[rows]

    def _repack(self) -> None:
        """Make every parameter a view again, keeping its values, after some were replaced."""
        parts = [(child._parameters[name], view) for child, name, view in self._views()]
        if all(_share_storage(parameter, view) for parameter, view in parts):
            return
        kinds = {(parameter.device, parameter.dtype) for parameter, _ in parts}
        packed_kind = (self.packed_weight.device, self.packed_weight.dtype)
        if len(kinds) > 1 and self.packed_weight.is_meta:
            return  # loaded in several parts: the rest is still to come
        if len(kinds) == 1 and kinds != {packed_kind}:
            device, dtype = kinds.pop()
            self.packed_weight = torch.empty_like(self.packed_weight, device=device, dtype=dtype)
            if self.packed_bias is not None:
                self.packed_bias = torch.empty_like(self.packed_bias, device=device, dtype=dtype)
        for child, name, view in self._views():
            if not _share_storage(child._parameters[name], view):
                view.copy_(child._parameters[name].detach())
                _bind(child, name, view)

    def _apply(self, fn, recurse=True):
        strays = [
            (child, name)
            for child, name, view in self._views()
            if not _share_storage(child._parameters[name], view)
        ]
        super()._apply(fn, recurse)  # the views ignore it
        self.packed_weight = fn(self.packed_weight)
        if self.packed_bias is not None:
            self.packed_bias = fn(self.packed_bias)
        for child, name, view in self._views():
            if (child, name) in strays:
                _bind(child, name, fn(child._parameters[name].detach()))
            else:
                _bind(child, name, view)
        self._repack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._repack()  # deepcopy and pickle give every tensor a storage of its own


def _kind(layer: nn.Module) -> str:
    """What layers must have in common to be packed."""
    weight, bias = layer.weight, "no bias" if layer.bias is None else "a bias"
    return f"[*, {weight.shape[1]}] {weight.dtype} on {weight.device} with {bias}"


def _repack_after_load(module: PackedLinears, incompatible_keys) -> None:
    with torch.no_grad():
        module._repack()


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _bind(child: nn.Module, name: str, tensor: Tensor) -> None:
    """Let the parameter be ``tensor``; as in ``Module.to`` it stays the same object if it can."""
    parameter = child._parameters[name]
    if torch._has_compatible_shallow_copy_type(parameter, tensor):
        parameter.data = tensor
    else:
        child._parameters[name] = nn.Parameter(tensor, requires_grad=False)
