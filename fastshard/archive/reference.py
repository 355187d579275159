"""The process of the row's own PyTorch code: makes the inputs, and, later, the right answers.

It is foreign code too, and has a sandbox, but no kernel is ever loaded here: no kernel can have
touched what its answers are held to. It answers for a set of inputs after the kernel has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastshard.archive import cases, peers, trees
from fastshard.archive.timing import FreshCalls, clock_of

_tasks: list[cases.Task] = []


def answer(request: dict) -> Iterator[dict]:
    """Do what a request asks: ``read``, ``make``, ``solve`` or ``time``."""
    torch.set_grad_enabled(False)
    steps = {"read": _read, "make": _make, "solve": _solve, "time": _time}
    yield {"starts": True}
    try:
        yield from steps[request["do"]](request)
    except cases.ReferenceFailed as error:
        yield {"failure": str(error)}
    except Exception as error:
        yield {"failure": _said(error)}


def _read(request: dict) -> Iterator[dict]:
    """Find the shapes on which the code runs: the published one, and some others.

    Args:
        request: ``code``, a file; ``dtype``, ``device``, ``seed``.
    """
    code = Path(request["code"]).read_text()
    dtype, device = getattr(torch, request["dtype"]), torch.device(request["device"])
    _tasks[:] = [cases.read_task(code)]
    published = _try(_tasks[0], request["seed"], dtype, device)
    shapes = [published]
    for other in cases.other_shapes(code):
        if len(shapes) > cases.MAX_SHAPES:
            break
        try:
            task = cases.read_task(other)
            found = _try(task, request["seed"], dtype, device)
        except Exception:  # a size that cannot be so, which most are where two must agree
            continue
        if found not in shapes:
            _tasks.append(task)
            shapes.append(found)
    yield {"shapes": shapes}


def _try(task: cases.Task, seed: int, dtype: torch.dtype, device: torch.device) -> list[list[int]]:
    """The shapes of a task's arguments; raises where its function does not take them."""
    arguments = cases.arguments_of(task, "as published", seed + 100, dtype)
    task.function(*trees.map_tensors(arguments, lambda x: x.to(device)))
    return trees.shapes_of(arguments)


def _make(request: dict) -> Iterator[dict]:
    """Write the arguments of one content.

    Args:
        request: ``shape``, its number; ``content``; ``dtype``, ``seed``; ``path`` to write.
    """
    task = _tasks[request["shape"]]
    dtype = getattr(torch, request["dtype"])
    arguments = cases.arguments_of(task, request["content"], request["seed"], dtype)
    packed = trees.pack(arguments)
    trees.save(Path(request["path"]), packed)
    yield {"can_scale": any(buffer.is_floating_point() for buffer in packed.buffers)}


def _solve(request: dict) -> Iterator[dict]:
    """Write the answers in the dtype of the arguments and in float64.

    Args:
        request: ``shape``, ``arguments``, ``path`` to write, ``device``.
    """
    function = _tasks[request["shape"]].function
    device = torch.device(request["device"])
    packed = trees.load(Path(request["arguments"]))
    packed.buffers = [buffer.to(device) for buffer in packed.buffers]
    before = [buffer.clone() for buffer in packed.buffers]
    doubled = trees.Packed(
        packed.tree, [b.double() if b.is_floating_point() else b.clone() for b in packed.buffers]
    )
    eager = trees.tensors_of(function(*packed.value()))
    numbered = list(enumerate(packed.buffers))
    edited = [i for i, buffer in numbered if not same_bits(buffer, before[i])]
    aliased = [i for i, buffer in numbered if any(lies_in(out, buffer) for out in eager)]
    golden = trees.tensors_of(function(*doubled.value()))
    both = {"eager": contiguous(eager), "golden": contiguous(golden)}
    trees.save(Path(request["path"]), trees.pack(both))
    yield {"edited": edited, "aliased": aliased}


def _time(request: dict) -> Iterator[dict]:
    """Time eager PyTorch, ``torch.compile`` and our op, in turn.

    Args:
        request: ``contents``, files of the published shape; ``device``, ``rounds``, ``compiles``,
            ``kind`` of the op, or null.
    """
    function = _tasks[0].function
    device = torch.device(request["device"])
    contents = [trees.load(Path(path)) for path in request["contents"]]
    arguments = trees.map_tensors(contents[0].value(), lambda x: x.to(device))
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    yield {"flops": counter.get_total_flops()}
    functions: dict[str, Callable[..., object]] = {"eager": function}
    notes = []
    ours = peers.ours(request["kind"], arguments)
    if isinstance(ours, str):
        notes.append(ours)
    else:
        functions["ours"] = ours
    if request["compiles"]:
        try:
            compiled = torch.compile(function)
            compiled(*arguments)
            functions["compile"] = compiled
        except Exception as error:  # of the compiler, which is a peer and no judge
            notes.append(f"torch.compile failed: {_said(error)}"[:200])
    runs = {name: FreshCalls(each, contents, device, {}) for name, each in functions.items()}
    timings = clock_of(device).measure(runs, rounds=request["rounds"])
    yield {"us": {name: timing.us for name, timing in timings.items()}, "notes": notes}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """In order, so that a file holds no more than the elements."""
    return [tensor.contiguous() for tensor in tensors]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two flat buffers are equal, NaN where NaN."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def lies_in(out: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether a tensor shares memory with a flat buffer."""
    begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    storage = out.untyped_storage()
    return storage.data_ptr() < end and begin < storage.data_ptr() + storage.nbytes()
