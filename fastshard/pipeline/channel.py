"""Channel: rank 0's words to the other ranks, by way of the hosts' memory.

Receives are posted ahead: for one that is not, gloo's sender asks first, and waits for the answer.
"""

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
    Stop,
    from_words,
    to_words,
)

_NUM_POSTED = 64  # receives
_MAX_ON_THEIR_WAY = 256  # messages a rank; each is taken without a word from rank 0
_TOKENS = 1  # tag of tokens, which are not to land in what is posted for commands


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
        self._posted: deque[tuple[dist.Work, Tensor]] = deque()

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
                self._push(torch.tensor(tokens, dtype=torch.int64), rank, _TOKENS)

    def receive(self) -> tuple[Command, list[int]]:
        """The next command for this rank, and tokens, if it is one of the first stage's."""
        while len(self._posted) < _NUM_POSTED:
            words = torch.empty(NUM_WORDS, dtype=torch.int64)
            self._posted.append((dist.irecv(words, 0), words))
        work, words = self._posted.popleft()
        work.wait()
        command = from_words(words)
        if isinstance(command, Stop):
            while self._posted:
                self._posted.popleft()[0].wait()
        tokens: list[int] = []
        if isinstance(command, Chunk) and self._world.is_first_stage:
            into = torch.empty(command.num_tokens, dtype=torch.int64)
            dist.recv(into, 0, tag=_TOKENS)
            tokens = into.tolist()
        return command, tokens

    def finish(self) -> None:
        """Wait until every command was taken, the ``Stop`` that ends them too."""
        for rank in self._others:
            for _ in range(_NUM_POSTED - 1):  # what is posted behind it
                self._push(to_words(Stop()), rank)
        while self._on_their_way:
            self._on_their_way.popleft()[0].wait()

    def _push(self, words: Tensor, rank: int, tag: int = 0) -> None:
        self._on_their_way.append((dist.isend(words, rank, tag=tag), words))
        while len(self._on_their_way) > _MAX_ON_THEIR_WAY * len(self._others):
            self._on_their_way.popleft()[0].wait()
