"""What ``torch.profiler`` recorded: calls of ops with their least work, and kernels."""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from fastshard import ops  # noqa: F401  (registers the schemas and the costs)
from fastshard.ops._library import COSTS, Cost

NAMESPACE = "fastshard::"
_DTYPES = {
    "float": torch.float32,
    "c10::Half": torch.float16,
    "c10::BFloat16": torch.bfloat16,
    "long": torch.int64,
    "long int": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}
"""The profiler's names of dtypes, which are those of C++."""
RECORDS_DTYPES = "input_dtypes" in inspect.signature(FunctionEvent.__init__).parameters
"""Whether this torch's profiler tells dtypes, without which no cost is known; 2.11's does not."""


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or of a copy, on the device."""

    name: str
    us: float


@dataclass(frozen=True)
class Call:
    """One call of an op by the host, from outside of any other op.

    Attributes:
        op: Its name with the namespace.
        cpu_us: From the call to the return.
        kernels: What it launched itself; nothing into a CUDA graph, which runs later.
        cost: Of an op of ours; None where it is not known.
    """

    op: str
    cpu_us: float
    kernels: tuple[Kernel, ...]
    cost: Cost | None


@dataclass(frozen=True)
class Recording:
    """Of one run.

    Attributes:
        calls: Of ops, in their order.
        kernels: All that ran on the device, those of calls and of replayed CUDA graphs.
    """

    calls: list[Call]
    kernels: list[Kernel]


def read(events: Iterable[FunctionEvent]) -> Recording:
    """Sort the profiler's events into calls and kernels; ranges and the runtime's own are left out.

    Args:
        events: Recorded with shapes.
    """
    calls, kernels = [], []
    for event in events:
        if event.is_user_annotation:
            continue
        if event.device_type != DeviceType.CPU:
            kernels.append(Kernel(event.name, event.time_range.elapsed_us()))
        elif _is_op(event) and not _is_within_op(event):
            launched = tuple(Kernel(k.name, k.duration) for k in _launched(event))
            calls.append(Call(event.name, event.cpu_time_total, launched, _cost(event)))
    return Recording(calls, kernels)


def _is_op(event: FunctionEvent) -> bool:
    return "::" in event.name and not event.is_user_annotation


def _is_within_op(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None and not _is_op(parent):
        parent = parent.cpu_parent
    return parent is not None


def _launched(event: FunctionEvent) -> Iterator:
    """The kernels of an op and of those within it.

    Events of the loader, which a first launch makes, repeat the kernels of their op.
    """
    if _is_op(event):
        yield from event.kernels
    for child in event.cpu_children:
        yield from _launched(child)


def _cost(event: FunctionEvent) -> Cost | None:
    """The least work of a call of ours by its recorded shapes, on the meta device."""
    name = event.name.removeprefix(NAMESPACE)
    if name == event.name or name not in COSTS:
        return None
    shapes = getattr(event, "structured_input_shapes", None) or event.input_shapes
    dtypes = event.input_dtypes if RECORDS_DTYPES else None
    arguments = getattr(torch.ops.fastshard, name).default._schema.arguments
    if not dtypes or not len(arguments) == len(shapes) == len(dtypes) == len(event.concrete_inputs):
        return None
    floating = [dtype for dtype in dtypes if dtype in ("float", "c10::Half", "c10::BFloat16")]
    values = []
    for argument, shape, dtype, value in zip(
        arguments, shapes, dtypes, event.concrete_inputs, strict=True
    ):
        if dtype == "TensorList":  # of the dtype of the first activation or weight
            is_known = bool(floating) and all(isinstance(dims, list) for dims in shape)
            if not is_known:
                return None
            value = [_meta(dims, floating[0]) for dims in shape]
        elif "Tensor" in str(argument.type) and dtype:
            if dtype not in _DTYPES:
                return None
            value = _meta(shape, dtype)
        values.append(value)
    return COSTS[name](*values)


def _meta(shape: list[int], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
