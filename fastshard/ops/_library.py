"""The compiled library and the registry of costs: what every op file needs, whatever its family."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


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
    """Declare the op ``fastshard::<schema>``, e.g. ``define("f(Tensor x) -> Tensor")``."""
    name, arguments = schema.split("(", 1)
    torch.library.define(f"fastshard::{name}", f"({arguments}", tags=torch.Tag.pt2_compliant_tag)


def load_kernels() -> bool:
    """Import the compiled kernels where this build has them and torch is a CUDA build.

    Decided by ``torch.version.cuda``, not by a visible GPU: a CUDA torch without one still traces.
    """
    if torch.version.cuda is None or importlib.util.find_spec("fastshard._C") is None:
        return False
    import fastshard._C  # noqa: F401  (registers on import)

    return True
