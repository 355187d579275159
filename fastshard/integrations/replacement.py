"""Modules of a model that stand in for others until ``undo``.

The stand-in has the parameters of the module it replaces, under the same names. It is the one that
is moved, cast and loaded; ``undo`` hands what became of its parameters back to the old module.
"""

import torch
from torch import nn

_ATTRIBUTE = "_fastshard_replacements"


class Replacements:
    """What was replaced in one model, in order."""

    def __init__(self):
        self._done: list[tuple[nn.Module, str, nn.Module]] = []

    def __len__(self) -> int:
        return len(self._done)

    @staticmethod
    def of(model: nn.Module) -> "Replacements | None":
        """What was replaced in ``model``, or None."""
        return model.__dict__.get(_ATTRIBUTE)

    def keep_in(self, model: nn.Module) -> None:
        """Remember these as those of ``model``."""
        model.__dict__[_ATTRIBUTE] = self

    def put(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Let ``module`` stand in for ``parent.<name>``.

        Args:
            parent: Of both.
            name: Of a child; an index where ``parent`` is a list.
            module: Takes over the training flag of the old one.

        Raises:
            ValueError: its parameters have other names.
        """
        old = parent.get_submodule(name)
        names, expected = (sorted(dict(m.named_parameters())) for m in (module, old))
        if names != expected:
            raise ValueError(f"{name} must have the parameters {expected}, got {names}")
        parent._modules[name] = module.train(old.training)
        self._done.append((parent, name, old))

    def undo(self, model: nn.Module) -> None:
        """Put the old modules of ``model`` back, with the parameters that their stand-ins have."""
        for parent, name, old in reversed(self._done):
            module = parent._modules[name]
            for path, parameter in module.named_parameters():
                owner, _, leaf = path.rpartition(".")
                _hand_over(old.get_submodule(owner), leaf, parameter)
            parent._modules[name] = old.train(module.training)
        self._done.clear()
        model.__dict__.pop(_ATTRIBUTE, None)


def _hand_over(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give ``owner.<name>`` the values of a parameter: it stays the same object where it can."""
    old = owner._parameters[name]
    if old is parameter:
        return
    if torch._has_compatible_shallow_copy_type(old, parameter):
        old.data = parameter.data
    else:
        owner._parameters[name] = nn.Parameter(parameter.data, requires_grad=old.requires_grad)
