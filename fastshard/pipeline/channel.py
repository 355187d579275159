"""Channel: rank 0's words to the other ranks, by way of the hosts' memory."""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastshard.dist import World
from fastshard.pipeline.commands import (
    NUM_WORDS,
    Chunk,
    Collect,
    Command,
    from_words,
    to_words,
)

_MAX_ON_THEIR_WAY = 256  # messages a rank; each is taken without a word from rank 0


class Channel:
    """Commands, in their order. Rank 0 sends them ahead; it does not wait for what they do.

    Args:
        world: Of one rank or more.
    """

    def __init__(self, world: World):
        self._world = world
        self._others = range(1, world.size)
        self._first_stage = range(1, world.tp)
        self._on_their_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, command: Command, tokens: Sequence[int] = ()) -> None:
        """Tell the ranks that a command is for.

        Args:
            tokens: Those of a ``Chunk``: the ranks of the first stage need them.
        """
        ranks = self._first_stage if isinstance(command, Collect) else self._others
        if not ranks:
            return
        words = to_words(command)
        for rank in ranks:
            self._push(words, rank)
        if isinstance(command, Chunk):
            for rank in self._first_stage:
                self._push(torch.tensor(tokens, dtype=torch.int64), rank)

    def receive(self) -> tuple[Command, list[int]]:
        """The next command for this rank, and tokens, if it is one of the first stage's."""
        words = torch.empty(NUM_WORDS, dtype=torch.int64)
        dist.recv(words, 0)
        command = from_words(words)
        tokens: list[int] = []
        if isinstance(command, Chunk) and self._world.is_first_stage:
            into = torch.empty(command.num_tokens, dtype=torch.int64)
            dist.recv(into, 0)
            tokens = into.tolist()
        return command, tokens

    def finish(self) -> None:
        """Wait until every command was taken."""
        while self._on_their_way:
            self._on_their_way.popleft()[0].wait()

    def _push(self, words: Tensor, rank: int) -> None:
        self._on_their_way.append((dist.isend(words, rank), words))
        while len(self._on_their_way) > _MAX_ON_THEIR_WAY * len(self._others):
            self._on_their_way.popleft()[0].wait()
