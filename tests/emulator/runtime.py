"""Puts the emulated kernels in place of the CPU references of ``torch.ops.fastshard``."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from emulator.build import build

NAMESPACE = "fastshard_emulator"
_functions: list[ctypes.CDLL] = []  # of the loaded library
_definitions: list[torch.library.Library] = []  # torch forgets a library's ops when it is deleted


def op_names() -> list[str]:
    """Every op of the installed package, without its namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("fastshard::") for n in names if n.startswith("fastshard::"))


def without_guards(output: Tensor) -> Tensor:
    """An output of an emulated kernel in a storage of its own, as the op promises."""
    return output.clone() if output.storage_offset() else output


def load(library: Path) -> dict[str, Callable]:
    """Load an emulator library; may be called once in a process.

    Returns:
        Op name -> its emulated kernel, for the ops whose C++ boundary the library holds.
    """
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in op_names():
        schema = str(getattr(torch.ops.fastshard, name).default._schema)
        definitions.define(schema.removeprefix("fastshard::"))
    _definitions.append(definitions)
    torch.ops.load_library(str(library))
    functions = ctypes.CDLL(str(library))
    _functions.append(functions)
    check_outputs = functions.fastshard_emulator_check_outputs
    check_outputs.restype = ctypes.c_char_p

    def checked(kernel: Callable) -> Callable:
        def call(*args):
            try:
                result = kernel(*args)
            finally:
                if fault := check_outputs():
                    raise RuntimeError(fault.decode())
            return torch.utils._pytree.tree_map_only(torch.Tensor, without_guards, result)

        return call

    return {
        name: checked(getattr(getattr(torch.ops, NAMESPACE), name).default)
        for name in op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    }


@functools.cache
def kernels() -> dict[str, Callable]:
    """The emulated kernels of the checkout's csrc, built on the first call.

    Raises:
        MissingTool: This machine has no compiler, or no CUDA headers.
    """
    with tempfile.TemporaryDirectory(prefix="fastshard-emulator-") as folder:
        return load(build(Path(folder)))  # once loaded, the file is not needed


@contextmanager
def variants(table: str) -> Iterator[None]:
    """Let emulated kernels choose by this table, as csrc/ops/variants.h takes it."""
    (functions,) = _functions
    functions.fastshard_emulator_use_variants(table.encode())
    try:
        yield
    finally:
        functions.fastshard_emulator_use_variants(b"")


def add_instance(op: str, dtype: str, variant: str, params_bytes: int, address: int) -> None:
    """Add a variant to the emulated kernels, as csrc/ops/instances.h takes it."""
    (functions,) = _functions
    add = functions.fastshard_emulator_add_instance
    add.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_size_t, ctypes.c_void_p]
    add(op.encode(), dtype.encode(), variant.encode(), params_bytes, address)


@contextmanager
def instance_loader(loader: Callable[[str, str, str], None]) -> Iterator[None]:
    """Let emulated kernels ask this for promoted kernels, as csrc/ops/instances.h has it."""
    (functions,) = _functions
    use = functions.fastshard_emulator_use_instance_loader
    callback = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 3)(
        lambda *words: loader(*(word.decode() for word in words))
    )
    use.argtypes = [type(callback)]
    use(callback)
    try:
        yield
    finally:
        use(type(callback)())


@contextmanager
def emulated(
    kernels: dict[str, Callable], missing: Callable[[str], None]
) -> Iterator[Counter[str]]:
    """Run the ops of ``fastshard`` on CPU tensors by `kernels` while the context lasts.

    Args:
        kernels: As `load` returns them.
        missing: Called with the name of an op that has no kernel when it is called; must raise.

    Yields:
        How often each op was called, those without a kernel too.
    """
    calls: Counter[str] = Counter()

    def stand_in(name: str) -> Callable:
        def call(*args):
            calls[name] += 1
            if name not in kernels:
                missing(name)
            return kernels[name](*args)

        return call

    implementations = torch.library.Library("fastshard", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in op_names():
            implementations.impl(name, stand_in(name), "CPU", allow_override=True)
    try:
        yield calls
    finally:
        implementations._destroy()
