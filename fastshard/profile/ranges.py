"""Names of layers for profilers; outside of ``ranges`` no module has a hook."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import record_function

from fastshard.models import ShardTransformerDecoder


@contextmanager
def ranges(*, nvtx: bool = False) -> Iterator[None]:
    """Put a range around every pass of a decoder, its layers and their parts, in this process.

    The names are those of the modules, like ``layers.3`` and ``layers.3.attn``; a whole pass is
    ``shard 0-15``. A step of one launch, and a replay of a CUDA graph, has no ranges within. Models
    run in one thread meanwhile.

    Args:
        nvtx: Also emit them to NVTX where there is a GPU, and a range for every op. Else they are
            seen by ``torch.profiler``, which must not run at the same time as this.
    """
    names: dict[nn.Module, str] = {}
    opened: list[record_function] = []

    def enter(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, ShardTransformerDecoder) and module not in names:
            names.update(_names(module))
        if module in names:
            opened.append(record_function(names[module]))
            opened[-1].__enter__()

    def leave(module: nn.Module, inputs: tuple, output: object) -> None:
        if module in names:
            opened.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        if nvtx and torch.cuda.is_available():
            stack.enter_context(torch.autograd.profiler.emit_nvtx())
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield


def _names(decoder: ShardTransformerDecoder) -> dict[nn.Module, str]:
    """Path of each module below the decoder; of one that layers share only its last part."""
    names: dict[nn.Module, str] = {}
    for path, module in decoder.named_modules(remove_duplicate=False):
        names[module] = path.rpartition(".")[2] if module in names else path
    names[decoder] = f"shard {decoder.shard.start_layer}-{decoder.shard.end_layer}"
    return names
