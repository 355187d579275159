"""PipelineRank: one rank's shards, its slots and its neighbours; it does what a command says."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastshard.decode import choose_mode, warn_of_fallback
from fastshard.dist import Hops, Sent, Steps, World
from fastshard.models import ShardedGeneralModel
from fastshard.pipeline.commands import Chunk, Collect, Command, Start, Step
from fastshard.pipeline.slot import Slot

_NUM_ARRIVALS = 4  # tokens of a slot: two may be on their way to the host


class PipelineRank:
    """One stage of a pipeline, or with tensor parallelism one rank of it.

    Every rank does the same commands in the same order; nothing here waits for a GPU.

    Attributes:
        world: ``World``.
        num_slots: Requests in flight.
        context: Tokens of a prompt and what follows it, in each slot.
        chunk_size: Tokens of a prompt at a time.
        steps: Is told of the commands that every rank does.
        num_done: Commands done, as far as this process has to do with them.
    """

    def __init__(
        self,
        world: World,
        models: Sequence[ShardedGeneralModel],
        hops: Hops | None = None,
        *,
        num_slots: int,
        context: int,
        chunk_size: int,
        mode: str,
        steps: Steps | None = None,
    ):
        """Take all memory, and capture what is captured.

        Args:
            world: This rank among the others.
            models: This stage's layers; in a world of one, all layers, on any devices.
            hops: To and from the other stages; None where there are none.
            num_slots: Requests in flight.
            context: Slots of each request's cache.
            chunk_size: Most tokens of a prompt at a time.
            mode: One of ``decode.MODES``. One that cannot run falls back, with a warning.
            steps: To be told what this rank is at.
        """
        self.world = world
        self.num_slots = num_slots
        self.context = context
        self.chunk_size = chunk_size
        self.steps: Steps = steps or Steps()
        self.num_done: int = 0
        self._forward, self._back = (None, None) if hops is None else hops
        # NCCL takes a small tensor at once, and the stream waits for that: else the next step, of a
        # persistent kernel that fills the GPU, may begin first, and the tensor leave a step later.
        self._max_on_their_way = 0 if world.uses_nccl else num_slots
        self._device = models[0].device
        self.steps.begin("preparing its graphs")
        chosen, reason = choose_mode(mode, models, 1)
        if reason is not None:
            warn_of_fallback("persistent" if mode == "auto" else mode, chosen, reason)
        self._slots: list[Slot] = []
        for _ in range(num_slots):
            slot = Slot(models, context=context, mode=chosen)
            reason = slot.warm_up()
            if reason is not None:
                warn_of_fallback("persistent", "graph", reason)
                chosen = "graph"
            self._slots.append(slot)
        self._tokens: list[Tensor | None] = [None] * num_slots  # the newest of each slot
        self._arrival = [0] * num_slots
        with torch.inference_mode(False):  # requests may come in it or outside of it
            if world.is_first_stage:
                shape = (num_slots, _NUM_ARRIVALS, 1)
                self._arrivals = torch.zeros(shape, dtype=torch.int64, device=self._device)
            else:
                shape = (1, min(chunk_size, context), models[0].config.hidden_size)
                self._chunk = torch.empty(shape, dtype=models[0].dtype, device=self._device)

    @property
    def sent(self) -> Sent:
        """Hidden states that went from this rank to the next stage."""
        return Sent(0, 0) if self._forward is None else self._forward.sent

    @torch.no_grad()
    def do(self, command: Command, tokens: Sequence[int] = ()) -> None:
        """Do one command.

        Args:
            tokens: Those of a ``Chunk``, on the first stage.
        """
        slot = self._slots[command.slot]
        if isinstance(command, Start):
            slot.start(command.sampling)
        elif isinstance(command, Chunk):
            x = self._chunk_input(command, tokens)
            y = slot.prefill(x, command.start, is_last=command.is_last)
            if y is not None:
                # At most one more chunk on its way: they are large.
                self._pass_on(command.slot, y, command.num_tokens, 1)
        elif isinstance(command, Step):
            if not self.world.is_first_stage:
                self._forward.receive(slot.x)
            self._pass_on(command.slot, slot.step(), 1, self._max_on_their_way)
        elif isinstance(command, Collect):
            self._collect(command.slot)
        self.num_done += 1
        if not isinstance(command, Collect):
            self.steps.finish(self._event())

    def newest_token(self, slot: int) -> Tensor:
        """``[1]`` int64: the token that ``Collect`` took last; stays for two more of the slot."""
        return self._tokens[slot]

    def finish(self) -> None:
        """Wait until all that was sent was taken."""
        for hop in filter(None, (self._forward, self._back)):
            hop.finish()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def drop_graphs(self) -> None:
        """Forget what was captured: sums over ranks in it would keep their group from ending."""
        for slot in self._slots:
            slot.drop_graphs()

    def _chunk_input(self, command: Chunk, tokens: Sequence[int]) -> Tensor:
        """``[1, s]`` tokens, or ``[1, s, hidden_size]`` from the stage before."""
        if not self.world.is_first_stage:
            return self._forward.receive(self._chunk[:, : command.num_tokens])
        x = torch.tensor([tokens], dtype=torch.int64)
        if self._device.type == "cuda":
            x = x.pin_memory()  # else the copy waits for all that was launched before
        return x.to(self._device, non_blocking=True)

    def _pass_on(self, slot: int, y: Tensor, num_tokens: int, max_on_their_way: int) -> None:
        """Send the hidden states, of which only so many may be on their way, or the token."""
        if not self.world.is_last_stage:
            self._forward.send(
                y.contiguous(), num_tokens=num_tokens, max_on_their_way=max_on_their_way
            )
        elif self._back is None:
            self._tokens[slot] = y
        else:
            self._back.send(y, num_tokens=1, max_on_their_way=self._max_on_their_way)

    def _collect(self, slot: int) -> None:
        if self._back is None:
            return
        # Not straight into the slot's input: the host may still be reading the token before.
        into = self._arrivals[slot, self._arrival[slot] % _NUM_ARRIVALS]
        self._arrival[slot] += 1
        self.steps.awaits = True
        self._slots[slot].x.copy_(self._back.receive(into))
        self.steps.awaits = False
        self._tokens[slot] = into

    def _event(self) -> torch.cuda.Event | None:
        """Done once a GPU has done what was launched so far."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
