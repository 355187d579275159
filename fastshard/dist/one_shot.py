"""OneShotSum: a sum of few rows over the GPUs of a host, each of which reaches the others' memory.

One kernel: it waits until all ranks have their summand in place, adds what it reads from them, and
waits until all have read. NCCL needs more rounds, which for the 8 KB of a token is all that a sum
takes. The memory, and the kernel, are PyTorch's ``symm_mem``; no NVLink multicast. A decode step in
one launch (``ops.decode_step``) adds up by itself, through such memory.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 256 * 1024
"""Of a sum: beyond, each rank reading everything takes longer than passing parts on."""
_DTYPES = (torch.bfloat16, torch.float32)  # that the kernel takes
_ALIGNMENT = 16  # bytes


class Place(NamedTuple):
    """Where a rank is: its host, and the index there of the GPU that it computes on."""

    host: str
    index: int


class OneShotSum:
    """Sums of up to ``MAX_BYTES``; every rank of the group runs the same ones, on one stream."""

    def __init__(
        self,
        buffer: Tensor,
        reduce: Callable[[Tensor, Tensor], object],
        share: Callable[[int], list[Tensor]],
    ):
        """Use memory that the other ranks can read; see ``meet``.

        Args:
            buffer: ``[MAX_BYTES]`` uint8.
            reduce: Given ``[n]`` at the start of the buffer and an output ``[n]``, sums over ranks.
            share: Makes int64 zeros ``[n]`` on each rank, and gives those of all.
        """
        self._buffer = buffer
        self._reduce = reduce
        self._share = share
        self._step_memory: dict[int, list[Tensor]] = {}

    @classmethod
    def meet(cls, group: dist.ProcessGroup, device: torch.device) -> "OneShotSum":
        """Share memory with the other ranks of the group; each of them must call it.

        Raises:
            RuntimeError: they cannot reach each other's memory, or this PyTorch has no such sum.
        """
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symm_mem

        name = group.group_name
        all_reduce = torch.ops.symm_mem.one_shot_all_reduce_out
        with torch.inference_mode(False):
            buffer = symm_mem.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(buffer, group)
        met = []  # the others' memory can be reached for as long as these are there

        def share(num_words: int) -> list[Tensor]:
            with torch.inference_mode(False):
                words = symm_mem.empty(num_words, dtype=torch.int64, device=device).zero_()
            torch.cuda.synchronize(device)  # another rank writes there as soon as they have met
            met.append(symm_mem.rendezvous(words, group))
            size, shape = dist.get_world_size(group), (num_words,)
            return [met[-1].get_buffer(rank, shape, torch.int64) for rank in range(size)]

        return cls(buffer, lambda part, out: all_reduce(part, "sum", name, out), share)

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` can be summed like this; alike on all ranks, it looks at shapes alone."""
        size, offset = x.numel() * x.element_size(), x.storage_offset() * x.element_size()
        return (
            x.dtype in _DTYPES
            and x.is_contiguous()
            and 0 < size <= MAX_BYTES
            and size % _ALIGNMENT == offset % _ALIGNMENT == 0
        )

    def add_up(self, x: Tensor) -> Tensor:
        """Sum ``x``, which it takes, in place; returns it."""
        rows = x.view(-1)
        part = self._buffer.view(x.dtype)[: len(rows)]
        part.copy_(rows)
        self._reduce(part, rows)
        return x

    def step_memory(self, num_words: int) -> list[Tensor]:
        """``rank_sums`` of ``ops.decode_step``, one for all steps; every rank must ask alike."""
        if num_words not in self._step_memory:
            self._step_memory[num_words] = self._share(num_words)
        return self._step_memory[num_words]


def one_shot_refusal(places: list[Place]) -> str | None:
    """Why the GPUs of these ranks cannot read each other's memory, or None."""
    here = places[0].host
    if any(place.host != here for place in places):
        return "the ranks are on several hosts"
    for a in places:
        for b in places:
            if a.index != b.index and not torch.cuda.can_device_access_peer(a.index, b.index):
                return f"cuda:{a.index} cannot access the memory of cuda:{b.index}"
    return None
