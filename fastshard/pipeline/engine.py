"""Engine: rank 0 turns requests into commands, and the tokens that come of them into texts.

Requests share the pipeline in turns, one slot each, always in one order: a turn of a slot is one
chunk of its prompt or one step. So tokens leave the last stage in the order in which rank 0 takes
them: at the next turn of their slot, or before where ``MAX_TOKENS`` are on their way. A slot whose
request ended takes the next one in the same turn.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from fastshard.dist import MAX_TOKENS
from fastshard.pipeline.channel import Channel
from fastshard.pipeline.commands import Chunk, Collect, Command, Start, Step, Stop
from fastshard.pipeline.rank import PipelineRank
from fastshard.sampling import Sampling
from fastshard.token_loop import HostCopies


class Request(Protocol):
    """What an engine runs.

    Attributes:
        prompt: At least one token.
        max_new_tokens: At least 1; with the prompt at most the context.
        sampling: Settings of its own: its tokens are those that it would have alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling

    def accept(self, token: int) -> bool:
        """Take the next token; returns whether no other is wanted."""


class Engine:
    """Rank 0's part of a pipeline.

    Args:
        rank: Of a world of one, or rank 0 of several whose others ``serve``.
    """

    def __init__(self, rank: PipelineRank):
        self._rank = rank
        self._channel = Channel(rank.world)
        self._readers = [_TokenReader() for _ in range(rank.num_slots)]
        self._not_collected: deque[int] = deque()  # slots, in the order of their tokens
        self._running: object | None = None

    def run(self, requests: Sequence[Request]) -> Iterator[int]:
        """Run all; yields the index of the request that took a token, once for each token."""
        self._running = this = object()
        self._collect_all()
        waiting = deque(enumerate(requests))
        flights: list[_Flight | None] = [None] * self._rank.num_slots
        while waiting or any(flights):
            for slot, flight in enumerate(flights):
                if flight is not None and self._turn(flight):
                    yield flight.index
                    if self._running is not this:
                        raise RuntimeError("the texts cannot go on: their pipeline got others")
                    if flight.has_ended:
                        flights[slot] = flight = None
                if flight is None and waiting:
                    flights[slot] = self._start(slot, *waiting.popleft())

    def stop(self, *, is_failure: bool = False) -> None:
        """Tell the other ranks that nothing more comes."""
        self._running = None
        if not is_failure:
            self._collect_all()
        self._rank.steps.issue()
        self._channel.send(Stop(is_failure))
        self._channel.finish()
        self._rank.steps.finish()

    def _collect_all(self) -> None:
        """Take what a run that was given up left on its way."""
        while self._not_collected:
            self._collect()

    def _start(self, slot: int, index: int, request: Request) -> "_Flight":
        self._readers[slot].clear()
        self._do(Start(slot, request.sampling))
        flight = _Flight(slot, index, request)
        self._launch(flight)
        return flight

    def _turn(self, flight: "_Flight") -> bool:
        """One slot's turn; returns whether its request took a token.

        A token is read when the step after it is launched: from a GPU the read waits for what has
        been launched a whole round ago. So at most one step of a request is in vain.
        """
        reader = self._readers[flight.slot]
        has_launched, flight.is_launched = flight.is_launched, False
        if flight.slot in self._not_collected:  # as the oldest: slots have their turns in order
            self._collect()
        takes = reader.num_pending > reader.lag or (reader.num_pending > 0 and not has_launched)
        if takes:
            self._rank.steps.awaits = True
            token = reader.pop()
            self._rank.steps.awaits = False
            flight.take(token)
        if not flight.has_ended and flight.num_to_launch > 0:
            self._launch(flight)
        return takes

    def _launch(self, flight: "_Flight") -> None:
        if len(self._not_collected) == MAX_TOKENS:
            self._collect()
        command, tokens = flight.next_command(self._rank.chunk_size)
        self._do(command, tokens)
        if flight.is_launched:
            self._not_collected.append(flight.slot)

    def _collect(self) -> None:
        """Take the oldest token that is on its way."""
        slot = self._not_collected.popleft()
        self._do(Collect(slot))
        self._readers[slot].push(self._rank.newest_token(slot))

    def _do(self, command: Command, tokens: Sequence[int] = ()) -> None:
        # First the others: they can begin when the data is there, whatever happens here.
        if not isinstance(command, Collect):
            self._rank.steps.issue()
        self._channel.send(command, tokens)
        self._rank.do(command, tokens)


def serve(rank: PipelineRank) -> Stop:
    """Obey rank 0 until it stops; for every other rank."""
    channel = Channel(rank.world)
    while True:
        command, tokens = channel.receive()
        if isinstance(command, Stop):
            rank.steps.finish()
            return command
        rank.do(command, tokens)


class _Flight:
    """A request in its slot.

    Attributes:
        is_launched: A token was launched in the last turn.
        num_to_launch: Commands that may follow: at least 1 where the prompt goes on.
        has_ended: It wants no more tokens.
    """

    def __init__(self, slot: int, index: int, request: Request):
        self.slot = slot
        self.index = index
        self.is_launched = False
        self.has_ended = False
        self._request = request
        self._start = 0
        self._num_launched = 0
        self._num_taken = 0

    @property
    def num_to_launch(self) -> int:
        return self._request.max_new_tokens - self._num_launched

    def next_command(self, chunk_size: int) -> tuple[Command, Sequence[int]]:
        """The next chunk with its tokens, or a step."""
        prompt = self._request.prompt
        if self._start == len(prompt):
            self._count_token()
            return Step(self.slot), ()
        start = self._start
        self._start = min(start + chunk_size, len(prompt))
        is_last = self._start == len(prompt)
        if is_last:
            self._count_token()
        return Chunk(self.slot, start, self._start - start, is_last), prompt[start : self._start]

    def _count_token(self) -> None:
        self.is_launched = True
        self._num_launched += 1

    def take(self, token: int) -> None:
        self._num_taken += 1
        ends = self._request.accept(token)
        self.has_ended = ends or self._num_taken == self._request.max_new_tokens


class _TokenReader:
    """A slot's tokens on their way to the host.

    Attributes:
        lag: How many may be on their way when a step is launched: none from a CPU.
    """

    lag: int = 0

    def __init__(self):
        self._tokens: deque[int] = deque()
        self._copies: HostCopies | None = None

    @property
    def num_pending(self) -> int:
        return len(self._tokens) if self._copies is None else self._copies.num_pending

    def push(self, token: torch.Tensor) -> None:
        if token.device.type == "cpu":
            self._tokens.append(token.item())
            return
        if self._copies is None:
            self._copies, self.lag = HostCopies(token), 1
        self._copies.push(token)

    def pop(self) -> int:
        return self._tokens.popleft() if self._copies is None else self._copies.pop()[0]

    def clear(self) -> None:
        """Forget what is pending."""
        self._tokens.clear()
        if self._copies is not None:
            self._copies.clear()
