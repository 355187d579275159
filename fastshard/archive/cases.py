"""The inputs on which a kernel is tried: contents of the published shape, and other shapes.

They are made of the row's own PyTorch code, which has the form of KernelBench's tasks: ``Model``,
``get_inputs``, ``get_init_inputs``, and a function that ``Model.forward`` takes as ``fn``. What
``Model`` passes to ``fn`` is what a kernel is given; ``Model`` is not run further.
"""

import ast
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastshard.archive import trees

CONTENTS = (
    "as published",
    "another seed",
    "one element changed",
    "scaled",
    "shifted",
    "heavy tails",
)
"""Of the published shape, in the order in which they come to the same addresses."""
OTHER = ("as published",)
"""Of each other shape."""
MAX_SHAPES = 4
SCALE, SHIFT, NOISE = 30.0, 10.0, 0.1

_numbers = itertools.count()


class ReferenceFailed(Exception):
    """The row's PyTorch code does not do what the archive says that it does."""


@dataclass(frozen=True)
class Task:
    """What a row's PyTorch code defines.

    Attributes:
        function: Of tensors and plain values; what a kernel computes too.
        make: (seed, noise of the parameters, change of the inputs) -> the function's arguments.
    """

    function: Callable[..., object]
    make: Callable[..., tuple]


class _Called(BaseException):
    """Carries the arguments out of ``Model.forward``; nothing that catches errors stops it."""

    def __init__(self, arguments: tuple, named: dict):
        self.arguments, self.named = arguments, named


def read_task(code: str) -> Task:
    """Run a row's code; in a sandbox alone.

    Raises:
        ReferenceFailed: it raises, or one of its parts is missing.
    """
    module = types.ModuleType(f"archive_reference_{next(_numbers)}")
    sys.modules[module.__name__] = module  # where torch.compile looks for a function's globals
    names = vars(module)
    try:
        exec(compile(code, "PyTorch_Code_Functional", "exec"), names)
        model, inputs = names["Model"], names["get_inputs"]
        initial = names.get("get_init_inputs", list)
        function = inspect.signature(model.forward).parameters["fn"].default
    except KeyError as error:
        raise ReferenceFailed(f"it has no {error}") from None
    except Exception as error:
        raise ReferenceFailed(_said(error)) from None

    def make(seed: int, noise: float, change: Callable[[list], list]) -> tuple:
        def capture(*arguments, **named):
            raise _Called(arguments, named)

        try:
            torch.manual_seed(seed)
            made = model(*initial())
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=noise)
            made(*change(list(inputs())), fn=capture)
        except _Called as call:
            if call.named:
                raise ReferenceFailed("it calls its function with named arguments") from None
            return call.arguments
        except Exception as error:
            raise ReferenceFailed(_said(error)) from None
        raise ReferenceFailed("it does not call its function")

    return Task(function, make)


def arguments_of(task: Task, content: str, seed: int, dtype: torch.dtype) -> tuple:
    """The arguments of one content, floating tensors in ``dtype``."""
    number = CONTENTS.index(content)
    # One element apart from the content before: the same seed.
    seed += 1 if content == "one element changed" else number
    noise = NOISE if number else 0.0
    made = task.make(seed, noise, lambda inputs: [_changed(x, content, seed) for x in inputs])
    return trees.map_tensors(made, lambda x: _rounded(x, dtype) if x.is_floating_point() else x)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is finite stays so: heavy tails reach beyond float16."""
    if x.dtype == dtype:
        return x
    limits = torch.finfo(dtype)
    return torch.where(x.isfinite(), x.clamp(limits.min, limits.max), x).to(dtype)


def _changed(x: object, content: str, seed: int) -> object:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        return x
    if content == "one element changed":
        x = x.clone()
        x.view(-1)[x.numel() // 2] = x.abs().max() * 2 + 1
    elif content == "scaled":
        x = x * SCALE
    elif content == "shifted":
        x = x + SHIFT
    elif content == "heavy tails":
        sizes = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        x = x * torch.exp(2 * sizes.to(x.device))
    return x


def other_shapes(code: str) -> Iterator[str]:
    """The code with one of its sizes changed, each size in turn, then again to another value.

    Sizes are the integers that ``get_inputs`` mentions, itself or by a name of the module. Which
    of the results still make sense is for who runs them to see.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    sizes = _sizes(tree)
    for change in (lambda n: n + 1, lambda n: n - n // 3):
        for size in sizes:
            published = size.value
            size.value = change(published)
            if size.value not in (published, 0):
                yield ast.unparse(tree)
            size.value = published


def _sizes(tree: ast.Module) -> list[ast.Constant]:
    """Integers of 2 and more that decide the shapes of the inputs."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for name, value in _pairs(node.targets[0], node.value):
                assigned.setdefault(name, []).append(value)
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "get_inputs"]
    found: list[ast.Constant] = []
    waiting: list[ast.AST] = list(functions)
    seen: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value >= 2:
                found.append(node)
            elif isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                waiting += assigned.get(node.id, [])
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for each, its in zip(target.elts, value.elts, strict=False):
            yield from _pairs(each, its)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
