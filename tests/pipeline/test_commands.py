"""Commands survive the way to another rank."""

import pytest
import torch

from fastshard.pipeline.commands import (
    NUM_WORDS,
    Chunk,
    Collect,
    Start,
    Step,
    Stop,
    from_words,
    to_words,
)
from fastshard.sampling import Sampling


@pytest.mark.parametrize(
    "command",
    [
        Start(3, Sampling()),
        Start(0, Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=1e-3, seed=2**63 - 1)),
        Chunk(1, 16384, 512, True),
        Chunk(2, 0, 1, False),
        Step(7),
        Collect(5),
        Stop(),
        Stop(is_failure=True),
    ],
    ids=str,
)
def test_round_trip(command):
    words = to_words(command)
    assert (words.dtype, words.shape) == (torch.int64, (NUM_WORDS,))
    again = from_words(words)
    assert again == command
    assert [type(value) for value in vars(again).values()] == [
        type(value) for value in vars(command).values()
    ]


def test_words_of_no_command():
    with pytest.raises(RuntimeError, match=r"^a command must begin with 0 to 4, got 5$"):
        from_words(torch.tensor([5] + [0] * 7))
