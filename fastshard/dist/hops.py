"""Hops: tensors of known shape from rank to rank, counted.

What may wait for what, and why nothing waits in a circle:

- Every rank obeys the same commands in the same order. A tensor is received when its command needs
  it, not before, so what arrives between two ranks is in the order in which it was sent.
- A hidden state waits for nobody but the next stage, which waits for its own next stage, and so on
  up to the last. So a rank may wait for hidden states to be taken, and bound those on their way.
- A token waits for the first stage, which may just be busy with another request. So the last stage
  must never wait for tokens to be taken.
- NCCL: a receive is launched only where the stream of the layers waits for it next. Beside one that
  waits longer, a persistent kernel, which needs all of its blocks resident at once, might not get
  in. A send leaves without its receiver while NCCL has a free place for it, of which it has
  ``MAX_TOKENS`` for each pair of ranks in a group. One more would wait beside the layers' kernels.
  For hidden states that ends, as the last stage never waits. A token's would not: the first stage
  may be waiting for its own hidden states to be taken, and so for the last stage. So the first
  stage takes a token before one more than ``MAX_TOKENS`` could be on their way. Then the stream of
  the layers may wait until a send has left.
"""

import warnings
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastshard.dist.world import World

MAX_TOKENS = 8
"""Tokens that may be on their way to the first stage: ``NCCL_STEPS``, places of a buffer."""


class Sent(NamedTuple):
    """What went over a hop."""

    num_bytes: int
    num_tokens: int


class Hop:
    """One group's way into this rank, and out of it.

    Attributes:
        sent: ``Sent`` so far.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup",
        *,
        source: int | None,
        target: int | None,
        uses_nccl: bool,
    ):
        """Know the way; talks to nobody.

        Args:
            group: NCCL's or gloo's, with both ranks.
            source: Rank to receive from, or None.
            target: Rank to send to, or None.
            uses_nccl: Whether the group is NCCL's. Gloo's tensors travel by the host's memory.
        """
        self._group = group
        self._source = source
        self._target = target
        self._uses_nccl = uses_nccl
        self._on_their_way: deque[tuple[dist.Work, Tensor]] = deque()
        self.sent = Sent(0, 0)

    def send(self, x: Tensor, *, num_tokens: int, max_on_their_way: int) -> None:
        """Send a copy of ``x``, once what is launched has computed it; does not wait for that.

        Args:
            x: Contiguous; not to be written before the target has it.
            num_tokens: How many tokens' states it is.
            max_on_their_way: Where more tensors than these were not taken yet, wait for the oldest:
                on NCCL the stream of the layers does, else this process.
        """
        if not self._uses_nccl and x.device.type == "cuda":
            x = _to_host(x)
        work = dist.isend(x, self._target, group=self._group)
        self._on_their_way.append((work, x))
        while len(self._on_their_way) > max_on_their_way:
            self._on_their_way.popleft()[0].wait()
        size = x.numel() * x.element_size()
        self.sent = Sent(self.sent.num_bytes + size, self.sent.num_tokens + num_tokens)

    def receive(self, into: Tensor) -> Tensor:
        """Receive what the source sent next in ``into``, contiguous; returns it.

        On NCCL the stream of the layers waits for it, and this process does not.
        """
        if self._uses_nccl or into.device.type == "cpu":
            dist.irecv(into, self._source, group=self._group).wait()
            return into
        host = torch.empty_like(into, device="cpu", pin_memory=True)
        dist.irecv(host, self._source, group=self._group).wait()
        return into.copy_(host, non_blocking=True)

    def meet(self, device: torch.device) -> None:
        """Receive from the source, then send to the target, what does not count."""
        token = torch.zeros(1, dtype=torch.int64, device=device)
        if self._source is not None:
            self.receive(token)
        if self._target is not None:
            self.send(token, num_tokens=0, max_on_their_way=0)
        self.sent = Sent(0, 0)

    def finish(self) -> None:
        """Wait until all that was sent was taken."""
        while self._on_their_way:
            self._on_their_way.popleft()[0].wait()


class Hops(NamedTuple):
    """A rank's ways to its neighbours.

    Attributes:
        forward: Hidden states, from a stage to the next.
        back: Tokens, from the last stage to the first.
    """

    forward: Hop
    back: Hop


def connect(world: World) -> Hops | None:
    """Meet the neighbours; every rank must. None where there is one stage.

    NCCL connects two ranks at their first tensor: the process waits for the other one, and memory
    is taken on both GPUs. That is better here, from the first stage to the last and back, than
    between steps, and before the free memory is shared out.
    """
    if world.num_stages == 1:
        return None
    is_first, is_last = world.is_first_stage, world.is_last_stage
    forward = Hop(
        world.groups.forward,
        source=None if is_first else world.previous_rank,
        target=None if is_last else world.next_rank,
        uses_nccl=world.uses_nccl,
    )
    back = Hop(
        world.groups.back,
        source=world.previous_rank if is_first else None,
        target=world.next_rank if is_last else None,
        uses_nccl=world.uses_nccl,
    )
    with warnings.catch_warnings():
        # Of a communicator for each pair of ranks: just what is wanted, see ``World``.
        warnings.filterwarnings("ignore", message=".*unbatched P2P op")
        for hop in (forward, back):
            hop.meet(world.device)
    return Hops(forward, back)


def _to_host(x: Tensor) -> Tensor:
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host
