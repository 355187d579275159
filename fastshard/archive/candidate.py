"""The process of one kernel: loads it, calls it, and times it, in a sandbox.

Only what is foreign and native runs here; the row's PyTorch code and every right answer are in
another process. What this process says of itself is believed no further than a kernel that does not
take the process over goes: answers are compared elsewhere, and a clock outside looks on.
"""

import ctypes
import importlib.machinery
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastshard.archive import trees
from fastshard.archive.compile import NAME
from fastshard.archive.reference import contiguous, lies_in, same_bits
from fastshard.archive.rules import count_poison
from fastshard.archive.timing import FreshCalls, clock_of, wait

SETTLE_SECONDS = 2.0
"""In which an answer that has poison in it may still change."""
LATE_CYCLES = 100_000_000
"""For which the stream is busy before it writes the inputs: some 50 ms. The kernel must be launched
within them, else what it leaves unordered does not show in this call."""


class _Kernel:
    """What one process holds of a kernel, from ``open`` on."""

    forward: Callable[..., object]
    device: torch.device
    guard: ctypes.CDLL | None = None
    packed: trees.Packed | None = None  # the arguments, at the same addresses for a shape
    previous: list[Tensor] = ()
    copies: list[Tensor] = ()


_kernel = _Kernel()


def answer(request: dict) -> Iterator[dict]:
    """Do what a request asks: ``open``, ``call``, ``time`` or ``clock``."""
    torch.set_grad_enabled(False)
    steps = {"open": _open, "call": _call, "time": _time, "clock": _clock}
    yield {"starts": True}
    try:
        yield from steps[request["do"]](request)
    except Exception as error:
        yield {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _open(request: dict) -> Iterator[dict]:
    """Load a kernel.

    Args:
        request: ``library``; ``device``; ``guard``, the library of canaries, or null.
    """
    _kernel.device = torch.device(request["device"])
    if request["guard"] is not None:
        _install(request["guard"], _kernel.device)
    wait(_kernel.device)
    Path(request["library"]).read_bytes()  # what fails up to here is not the kernel's fault
    yield {"begins": "load"}
    loader = importlib.machinery.ExtensionFileLoader(NAME, request["library"])
    spec = importlib.util.spec_from_loader(NAME, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    _kernel.forward = module.forward


def _install(library: str, device: torch.device) -> None:
    """Put canaries around every buffer that PyTorch makes from here on, poison into it."""
    guard = ctypes.CDLL(library)
    guard.guard_check.restype = ctypes.c_char_p
    if device.type == "cuda":
        allocator = torch.cuda.memory.CUDAPluggableAllocator(library, "guard_malloc", "guard_free")
        torch.cuda.memory.change_current_allocator(allocator)
    else:
        guard.guard_install()
    _kernel.guard = guard


def _call(request: dict) -> Iterator[dict]:
    """Call the kernel once on the arguments of a file.

    Args:
        request: ``arguments``; ``is_first`` of a shape, else the arguments are written to where the
            last ones were; ``poison``, a byte; ``out`` to write.
    """
    content = trees.load(Path(request["arguments"])).buffers
    _kernel.guard.guard_poison(request["poison"])
    packed = _place(request["arguments"], content, request["is_first"])
    fresh = [buffer.to(_kernel.device) for buffer in content]
    if _kernel.device.type == "cuda":
        # The stream is busy before it writes them: what does not wait for it reads poison.
        for buffer in packed.buffers:
            buffer.view(torch.uint8).fill_(request["poison"])
        wait(_kernel.device)
        torch.cuda._sleep(LATE_CYCLES)
    for buffer, value in zip(packed.buffers, fresh, strict=True):
        buffer.copy_(value)
    arguments = packed.value()
    yield {"begins": "call"}
    outs = trees.tensors_of(_kernel.forward(*arguments))
    copies = [out.detach().clone() for out in outs]  # behind the call, on its stream
    wait(_kernel.device)
    yield {"returned": True}
    said = {
        "is_late": _changes(outs, copies, request["poison"]),
        "edited": [i for i, b in enumerate(packed.buffers) if not same_bits(b, fresh[i])],
        "aliased": [
            i for i, b in enumerate(packed.buffers) if any(lies_in(out, b) for out in outs)
        ],
        "is_earlier": any(
            lies_in(out, old.view(-1)) for out in outs for old in _kernel.previous if old.numel()
        ),
    }
    _kernel.previous = [out for out in outs if out.is_contiguous()]  # kept alive until the next
    trees.save(Path(request["out"]), trees.pack(contiguous(copies)))
    yield said | {"guards": _kernel.guard.guard_check().decode()}


def _place(path: str, content: list[Tensor], is_first: bool) -> trees.Packed:
    """The arguments in this process: new buffers for a new shape, else those of the last call."""
    if is_first:
        _kernel.previous = []
        tree = trees.load(Path(path)).tree
        buffers = [torch.empty_like(buffer, device=_kernel.device) for buffer in content]
        _kernel.packed = trees.Packed(tree, buffers)
    return _kernel.packed


def _changes(outs: list[Tensor], copies: list[Tensor], poison: int) -> bool:
    """Whether an answer is no more what it was when the stream had passed the call.

    One that has poison in it is waited for: it may be written by a thread, or on another stream.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        wait(_kernel.device)
        pairs = zip(outs, copies, strict=True)
        if any(not same_bits(out.contiguous().view(-1), c.view(-1)) for out, c in pairs):
            return True
        is_poisoned = any(count_poison(copy, poison) for copy in copies)
        if not is_poisoned or time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _time(request: dict) -> Iterator[dict]:
    """Time the kernel, and write what it answered in the known rounds.

    Args:
        request: ``contents``, files; ``known``, pairs of round and content; ``rounds``; ``out``, a
            folder.
    """
    contents = [trees.load(Path(path)) for path in request["contents"]]
    run = FreshCalls(_kernel.forward, contents, _kernel.device, dict(request["known"]))
    yield {"begins": "time"}
    timing = clock_of(_kernel.device).measure({"kernel": run}, rounds=request["rounds"])["kernel"]
    run.keep()
    for content, outs in run.answers.items():
        trees.save(Path(request["out"]) / f"timed{content}", trees.pack(contiguous(outs)))
    yield {"us": timing.us, "p20": timing.p20, "p80": timing.p80, "n": timing.n}


def _clock(request: dict) -> Iterator[dict]:
    """Call the kernel, between two messages that the asking process takes the time of.

    Args:
        request: ``arguments``, ``calls``.
    """
    packed = trees.load(Path(request["arguments"]))
    packed.buffers = [buffer.to(_kernel.device) for buffer in packed.buffers]
    arguments, forward = packed.value(), _kernel.forward
    forward(*arguments)
    wait(_kernel.device)
    yield {"begins": "clock"}
    for _ in range(request["calls"]):
        forward(*arguments)
    wait(_kernel.device)
    yield {"ends": "clock"}
