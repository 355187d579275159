"""Engine: what it tells the ranks, and when it takes the tokens that come of it."""

from collections import deque

import pytest
import torch
from pipeline_programs import TokenRequest

from fastshard.dist import MAX_TOKENS, Steps, World
from fastshard.pipeline.commands import Chunk, Collect, Start, Step
from fastshard.pipeline.engine import Engine

PROMPT_TOKENS = 5  # two chunks


class CountingRank:
    """A rank whose slots give the numbers 0, 1, 2... after each prompt.

    Attributes:
        most_on_their_way: Tokens that were launched and not collected, at most.
    """

    def __init__(self, num_slots):
        self.world = World()
        self.num_slots = num_slots
        self.chunk_size = 3
        self.steps = Steps()
        self.most_on_their_way = 0
        self._on_their_way = deque()
        self._next = [0] * num_slots
        self._tokens = [None] * num_slots

    def do(self, command, tokens=()):
        slot = command.slot
        if isinstance(command, Start):
            self._next[slot] = 0
        elif isinstance(command, Step) or (isinstance(command, Chunk) and command.is_last):
            self._on_their_way.append((slot, self._next[slot]))
            self._next[slot] += 1
            self.most_on_their_way = max(self.most_on_their_way, len(self._on_their_way))
        elif isinstance(command, Collect):
            of, token = self._on_their_way.popleft()
            assert of == slot  # in the order in which they come
            self._tokens[slot] = torch.tensor([token])

    def newest_token(self, slot):
        return self._tokens[slot]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("num_slots", [1, MAX_TOKENS, MAX_TOKENS + 1, 3 * MAX_TOKENS])
def test_few_tokens_are_on_their_way(num_slots, lag):
    """NCCL has room for so many: another might wait for ever. Some texts end early, some slots."""
    rank = CountingRank(num_slots)
    engine = Engine(rank)
    for reader in engine._readers:
        reader.lag = lag
    lengths = [2 + i % 5 for i in range(2 * num_slots + 1)]
    requests = [
        TokenRequest([1] * PROMPT_TOKENS, length + i % 2, ends=(length - 1,))
        for i, length in enumerate(lengths)
    ]
    for _ in engine.run(requests):
        pass
    assert [request.tokens for request in requests] == [list(range(length)) for length in lengths]
    assert rank.most_on_their_way == min(num_slots, MAX_TOKENS)
