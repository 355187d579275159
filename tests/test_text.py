"""Text from single tokens: the concatenation is what decoding all of them at once gives."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from fastshard.text import Continuation, Detokenizer, StopFilter

TEXT = "Grüße, 世界! \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{FIRE} a  b\n\té ½"


def byte_tokenizer():
    """Decodes token i as the byte i, as byte-level BPE decodes what has no merge."""
    return lambda tokens: bytes(tokens).decode("utf-8", errors="replace")


def metaspace_tokenizer():
    """As Llama 2's: spaces are U+2581, the first one is stripped, unknown characters are bytes."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "!": 4}
    vocab |= {f"<0x{i:02X}>": 5 + i for i in range(256)}
    merges = [("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab | {"a": 300}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def stream(decode, tokens, prompt=()):
    detokenizer = Detokenizer(decode, prompt)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.finish()]


def test_bytes_come_as_whole_characters():
    tokens = list(TEXT.encode())
    pieces = stream(byte_tokenizer(), tokens)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_prompt_that_ends_within_a_character_does_not_shift_the_text():
    tokens = list("xé世y".encode())
    for cut in range(len(tokens)):
        pieces = stream(byte_tokenizer(), tokens[cut:], tokens[:cut])
        assert "".join(pieces).endswith("y")
        assert len("".join(pieces)) <= len(bytes(tokens[cut:]).decode(errors="replace"))


@pytest.mark.parametrize("prompt", ["", "b", "a b", "b! a"])
def test_spaces_between_words_are_kept(prompt):
    """The decoder strips the first space of what it gets: only that of the whole text may go."""
    tokenizer = metaspace_tokenizer()
    text = " a b é a!\N{FIRE} a"
    whole = tokenizer.encode(prompt + text).ids
    start = len(tokenizer.encode(prompt).ids)
    pieces = stream(tokenizer.decode, whole[start:], whole[:start])
    assert "".join(pieces) == text


def test_an_incomplete_end_is_given_at_last():
    pieces = stream(byte_tokenizer(), [*b"ab", 0xE4, 0xB8])
    assert pieces == ["a", "b", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_bytes_that_are_no_text_are_not_held_for_ever():
    detokenizer = Detokenizer(byte_tokenizer())
    pieces = [detokenizer.push(0xFF) for _ in range(64)]
    assert pieces.count("") == 60
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 64
    assert "".join(detokenizer.push(token) for token in b"ok") == "ok"


def filtered(stops, pieces):
    stop_filter = StopFilter(stops)
    text = "".join(stop_filter.push(piece) for piece in pieces)
    return text + stop_filter.finish(), stop_filter.stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", "abc"),
        (["x"], "abc", "abc"),
        (["c"], "abc", "ab"),
        (["bc", "c"], "abcd", "a"),
        (["c", "bc"], "abcd", "a"),
        (["abab"], "aababab", "a"),
        (["aab"], "aaaab", "aa"),
        (["ab", "b"], "xab", "x"),
        (["abcd"], "xabc", "xabc"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["a"], "a", ""),
    ],
)
def test_stop_strings_end_the_text_however_it_is_cut(stops, text, expected):
    rng = random.Random(0)
    cuttings = [[text], list(text)]
    for _ in range(20):
        ends = sorted(rng.choices(range(len(text) + 1), k=3))
        bounds = [0, *ends, len(text)]
        cuttings.append([text[a:b] for a, b in pairwise(bounds)])
    for pieces in cuttings:
        assert filtered(stops, pieces) == (expected, expected != text), pieces


def test_text_is_held_only_while_a_stop_may_begin():
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(piece) for piece in ("aE", "N", "x", "E")] == ["a", "", "ENx", ""]
    assert stop_filter.finish() == "E"


def test_an_empty_stop_string_raises():
    with pytest.raises(ValueError, match=r"stop must be non-empty strings, got \['a', ''\]"):
        StopFilter(["a", ""])


LETTERS = byte_tokenizer()


@pytest.mark.parametrize(
    ("text", "pieces", "end", "ended"),
    [
        ("abc", ["a", "b", "c"], "", False),
        ("a\x00", ["a", ""], "", True),  # the end token is not in the text
        ("aEN", ["a", "", ""], "EN", False),  # what may begin a stop string comes at the end
        ("aEN\x00", ["a", "", "", ""], "EN", True),
        ("aEND", ["a", "", "", ""], "", True),
        ("ü", ["", "ü"], "", False),
    ],
)
def test_a_continuation_ends_at_an_end_token_or_a_stop_string(text, pieces, end, ended):
    continuation = Continuation(LETTERS, list(b"x "), [0], ["END"])
    assert [continuation.push(token) for token in text.encode()] == pieces
    assert continuation.ended == ended
    assert continuation.finish() == end
    assert continuation.num_tokens == len(text.encode())
