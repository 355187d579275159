"""Texts come in order: the first that has not ended piece by piece, the others when they may."""

from fastshard.pipeline import TextRequest, Texts
from fastshard.sampling import Sampling
from fastshard.text import Continuation


def letters(tokens):
    return "".join(map(chr, tokens))


def texts_of(script, num_prompts, max_new_tokens, stops=()):
    """Texts whose requests take the letters of ``script`` in its order: pairs of index, letter."""
    requests = [
        TextRequest([65], max_new_tokens, Sampling(), Continuation(letters, [65], (), stops))
        for _ in range(num_prompts)
    ]

    def run(requests):
        for index, letter in script:
            assert not requests[index].has_ended
            requests[index].accept(ord(letter))
            yield index

    return Texts(requests, run)


def test_the_first_comes_at_once_and_the_others_in_one_piece():
    script = [(0, "a"), (1, "k"), (2, "x"), (1, "l"), (2, "y"), (0, "b"), (0, "c"), (1, "m")]
    texts = texts_of([*script, (2, "z")], 3, 3)
    seen = []
    for index, piece in texts:
        seen.append((index, piece, texts.num_tokens, texts.num_ended))
    assert seen == [
        (0, "a", 1, 0),
        (0, "b", 6, 0),
        (0, "c", 7, 1),
        (1, "kl", 7, 1),
        (1, "m", 8, 2),
        (2, "xy", 8, 2),
        (2, "z", 9, 3),
    ]


def test_a_text_that_ended_before_its_turn_is_one_piece():
    script = [(1, "k"), (1, "l"), (0, "a"), (2, "x"), (0, "b"), (2, "y")]
    assert list(texts_of(script, 3, 2)) == [(0, "a"), (0, "b"), (1, "kl"), (2, "x"), (2, "y")]


def test_what_is_held_back_for_a_stop_string_comes_at_the_end():
    script = [(0, "a"), (0, "!"), (1, "k"), (1, "!"), (1, "?")]
    texts = texts_of(script, 2, 3, stops=["!?"])
    assert list(texts)[:1] == [(0, "a")]
    script = [(0, "!"), (0, "!"), (0, "a"), (1, "k"), (1, "!"), (1, "?")]
    assert list(texts_of(script, 2, 3, stops=["!?"])) == [(0, "!"), (0, "!a"), (1, "k"), (1, "")]
