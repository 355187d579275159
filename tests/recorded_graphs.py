"""A stand-in for CUDA graphs on the CPU.

It records the ops of a step and runs them again on the same tensors: a step that keeps anything on
the host goes wrong in it too.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastshard.decode import modes, static
from fastshard.models import inputs


class Recording(TorchDispatchMode):
    """The ops that run in it, to be run again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # which may write to any tensor, as a graph does
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(new, torch.ScriptObject):  # the work of a collective
                    torch.distributed.Work.unbox(new).wait()
                elif isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(launch, device):
    """In place of a capture: runs once, which is the first replay."""
    with Recording() as recording:
        launch()
    rest = iter([lambda: None])
    return lambda: next(rest, recording.replay)()


def pretend_to_capture(monkeypatch) -> list:
    """Pretend that the CPU is a GPU; returns the list of recordings made, which grows."""
    made = []

    def capture(launch, device):
        made.append(device)
        return record(launch, device)

    monkeypatch.setattr(modes, "is_gpu", lambda device: True)
    monkeypatch.setattr(static, "is_gpu", lambda device: True)
    monkeypatch.setattr(static, "capture", capture)
    monkeypatch.setattr(inputs, "_check_range", lambda *arguments: None)  # it reads CPU tensors
    return made
