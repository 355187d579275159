"""The compiled library and the registry of costs: what every op file needs, whatever its family."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

_LIBRARY = torch.library.Library("fastshard", "FRAGMENT")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


@dataclass(frozen=True)
class Cost:
    """The least work that one call must do: the floor that benchmarks compare with.

    Attributes:
        bytes: Global memory traffic, every input read once and every output written once.
        flops: Floating-point operations, a multiply-add counted as two.
    """

    bytes: int
    flops: int


COSTS: dict[str, Callable[..., Cost]] = {}
"""Op name without its namespace -> function of the op's own arguments."""


def cost(op_name: str) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    """Register the decorated function as the cost of ``torch.ops.fastshard.<op_name>``."""

    def register(function: Callable[..., Cost]) -> Callable[..., Cost]:
        COSTS[op_name] = function
        return function

    return register


def define(schema: str) -> None:
    """Declare the op ``fastshard::<schema>``, e.g. ``define("f(Tensor x) -> Tensor")``.

    Under ``torch.autocast`` the op runs as outside of it. ``torch.vmap`` calls an op in a loop, as
    PyTorch does by default, but raises for one that writes to an argument.
    """
    name, arguments = schema.split("(", 1)
    torch.library.define(f"fastshard::{name}", f"({arguments}", tags=torch.Tag.pt2_compliant_tag)
    op = getattr(torch.ops.fastshard, name).default
    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(name, _without_autocast(op), key)
    if op._schema.is_mutable:
        _LIBRARY.impl(name, _refuse_vmap(name), "FuncTorchBatched")


def _without_autocast(op: Callable) -> Callable:
    """The op with autocast off: else it would reach the matmuls of kernels and CPU references."""

    def call(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*arguments)

    return call


def _refuse_vmap(name: str) -> Callable:
    def call(*arguments):
        raise RuntimeError(
            f"{name} does not run under torch.vmap, for it writes to its arguments: "
            "call it once, on the whole batch"
        )

    return call


def load_kernels() -> bool:
    """Import the compiled kernels where this build has them and torch is a CUDA build.

    Decided by ``torch.version.cuda``, not by a visible GPU: a CUDA torch without one still traces.
    """
    if torch.version.cuda is None or importlib.util.find_spec("fastshard._C") is None:
        return False
    import fastshard._C  # noqa: F401  (registers on import)

    return True
