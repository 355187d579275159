"""World: this process among those that torchrun started, and the groups that they talk in."""

import socket
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastshard.dist.causes import describe
from fastshard.dist.one_shot import OneShotSum, Place, one_shot_refusal
from fastshard.dist.tensor_parallel import TensorParallel
from fastshard.environment import launched_rank, sum_way

# Whoever watches the ranks ends a run that hangs. A limit of the groups' own would end a sound one
# whose ranks wait for work, and on GPUs abort the process without a word of ours.
_NO_LIMIT = timedelta(days=365)

SUM_WAYS = ("group", "one_shot")
"""How ranks that share layers add up: by their process group, or small sums by ``OneShotSum``."""


class Groups(NamedTuple):
    """The process groups of a world, made by every rank in this order.

    NCCL runs what goes between one pair of ranks in one group as one queue. So hidden states and
    tokens are in groups of their own: else a rank that waits to send one would never receive the
    other. What rank 0 says to the others travels by CPU memory, in the default group.

    Attributes:
        forward: Hidden states, from a stage to the next.
        back: Tokens, from the last stage to the first.
        tensor: The ranks of this rank's stage; None where they are one.
    """

    forward: dist.ProcessGroup
    back: dist.ProcessGroup
    tensor: dist.ProcessGroup | None


class World:
    """One process of a run: a stage of the pipeline, or with ``tp`` ranks a stage, a part of one.

    Rank ``stage * tp + tp_index``; stage 0 has the first layers. A world of one rank needs no
    launcher and has no groups.

    Attributes:
        rank: Of this process, from 0.
        size: Ranks in all.
        tp: Ranks that share a stage's layers.
        device: Where this rank computes.
        store: What torchrun's ranks share, a key-value store; None where there is one rank. The
            groups keep keys in it too: for others, take a ``PrefixStore``.
        groups: ``Groups``, or None where there is one rank.
        tensor_parallel: This rank among those that share its stage's layers; None where it is one.
        num_sharing: Ranks on this rank's device, itself included; the CPUs of a host are one.
        uses_nccl: Whether the groups of tensors are NCCL's. Else they are gloo's, and what is on a
            GPU travels by way of the host.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        tp: int = 1,
        device: torch.device | str = "cpu",
        store: "dist.Store | None" = None,
        sums: str = "group",
    ):
        """Join ``size - 1`` other processes; waits for them. See ``join_world``."""
        if tp < 1 or size % tp:
            raise ValueError(f"tp must divide the world of {size} ranks, got {tp}")
        if not 0 <= rank < size:
            raise ValueError(f"rank must be 0 to {size - 1}, got {rank}")
        if size > 1 and store is None:
            raise ValueError(f"a world of {size} ranks needs a store, got None")
        self.rank = rank
        self.size = size
        self.tp = tp
        self.device: torch.device = torch.device(device)
        self.store = store
        self.groups: Groups | None = None
        self.tensor_parallel: TensorParallel | None = None
        self._drops: list[Callable[[], None]] = []
        self.num_sharing: int = 1
        self.uses_nccl: bool = False
        if size > 1:
            self._connect()
        if tp > 1:
            one_shot = self._meet_for_one_shot() if sums == "one_shot" else None
            self.tensor_parallel = TensorParallel.of(self.groups.tensor, one_shot)

    def _connect(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL, and what is captured, take the current one
        dist.init_process_group(
            "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=_NO_LIMIT,
        )
        names = self.gather(_device_name(self.device))
        self.num_sharing = names.count(names[self.rank])
        are_gpus = all(is_gpu for is_gpu, _, _ in names) and len(set(names)) == self.size
        self.uses_nccl = are_gpus and dist.is_nccl_available()
        everyone = range(self.size)
        forward, back = self._new_group(everyone), self._new_group(everyone)
        tensor = None
        if self.tp > 1:
            for stage in range(self.num_stages):
                group = self._new_group(self.ranks_of(stage))
                tensor = group if stage == self.stage else tensor
        self.groups = Groups(forward, back, tensor)

    def _new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        # Without a device_id: then NCCL connects each pair of ranks by itself, when they first
        # talk. With one, all that a rank sends and receives in a group would be one queue.
        backend = "nccl" if self.uses_nccl else "gloo"
        return dist.new_group(list(ranks), timeout=_NO_LIMIT, backend=backend)

    def _meet_for_one_shot(self) -> OneShotSum | None:
        """Where any rank cannot, none does, and rank 0 says why."""
        places = self.gather(Place(socket.gethostname(), self.device.index or 0))
        one_shot, refusal = None, "the ranks talk by gloo"
        if self.uses_nccl:
            refusal = one_shot_refusal([places[rank] for rank in self.ranks_of(self.stage)])
        if refusal is None:
            try:
                one_shot = OneShotSum.meet(self.groups.tensor, self.device)
            except (RuntimeError, AttributeError, ImportError) as error:
                refusal = describe(error)
        refusal = next(filter(None, self.gather(refusal)), None)
        if refusal is None:
            return one_shot
        if self.rank == 0:
            text = f"sums in one shot are not possible, falling back to the group's: {refusal}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        return None

    @property
    def stage(self) -> int:
        """Place in the pipeline, from 0."""
        return self.rank // self.tp

    @property
    def num_stages(self) -> int:
        return self.size // self.tp

    @property
    def tp_index(self) -> int:
        """Place among the ranks of this stage, from 0."""
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def next_rank(self) -> int:
        """Who gets what this rank computes: the next stage, or after the last one the first."""
        return (self.rank + self.tp) % self.size

    @property
    def previous_rank(self) -> int:
        """Whose ``next_rank`` this one is."""
        return (self.rank - self.tp) % self.size

    def ranks_of(self, stage: int) -> range:
        """The ranks that share the layers of ``stage``."""
        return range(stage * self.tp, (stage + 1) * self.tp)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in their order; every rank must call it. ``value`` is pickled."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def at_end(self, drop: Callable[[], None]) -> None:
        """Have ``drop`` called before the groups end: it lets go of what holds on to them.

        NCCL ends a group only when there is no CUDA graph any more that holds a sum of it.
        """
        self._drops.append(drop)

    def close(self) -> None:
        """Leave. Every rank must, when all that it sent or receives is done."""
        self._drop_all()
        if self.groups is not None:
            self.groups = self.tensor_parallel = None
            dist.destroy_process_group()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest) -> None:
        # After an error the others may never leave, and the process ends anyway.
        if error is None:
            self.close()
        else:
            self._drop_all()

    def _drop_all(self) -> None:
        while self._drops:
            self._drops.pop()()


def join_world(
    *,
    tp: int = 1,
    device: torch.device | str = "cpu",
    store: "dist.Store | None" = None,
    sums: str | None = None,
) -> World:
    """Join the processes that torchrun started, by its environment; without it, be alone.

    Args:
        tp: Ranks that share a stage's layers.
        device: Of this rank, as ``local_device`` takes it. Ranks may share a GPU, which NCCL does
            not allow: they talk by gloo then.
        store: What ``torchrun_store`` found; None: looked for here.
        sums: How ranks that share layers add up, one of ``SUM_WAYS``; None: as ``FASTSHARD_SUMS``
            says, else ``group``. Where one shot is not possible they fall back, with a warning.

    Raises:
        ValueError: ``tp`` does not divide the number of ranks, or there is no such way.
        RuntimeError: the store is not reached.
    """
    device = local_device(device)
    name, sums = ("sums", sums) if sums is not None else ("FASTSHARD_SUMS", sum_way())
    if sums not in SUM_WAYS:
        raise ValueError(f"{name} must be one of {', '.join(SUM_WAYS)}, got {sums!r}")
    launched = launched_rank()
    if launched is None or launched.size == 1:
        return World(tp=tp, device=device)
    store = store or torchrun_store()
    return World(launched.rank, launched.size, tp=tp, device=device, store=store, sums=sums)


def torchrun_store(timeout: float = 300.0) -> "dist.Store":
    """Reach the store that torchrun's ranks share, by its environment.

    Raises:
        RuntimeError: it is not reached within ``timeout`` seconds.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return store


def local_device(device: torch.device | str) -> torch.device:
    """``device``; on a rank of torchrun, of ``cuda`` the GPU of its place on its host."""
    device, launched = torch.device(device), launched_rank()
    if launched is None or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", launched.local_rank)


def _device_name(device: torch.device) -> tuple[bool, str, str]:
    """Whether it is a GPU, its host, and which of the host's it is: one name a device."""
    is_gpu = device.type == "cuda"
    uuid = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else ""
    return is_gpu, socket.gethostname(), uuid
