"""The bytes and the dict of a state: round trips, what is written, and every refusal."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from fastshard import ShardInferenceState as State

STATE = State(
    torch.tensor([[1, 2, 3], [4, 5, 70000]]),
    7,
    torch.tensor([0, 9]),
    torch.tensor([[3, 9, 1], [0, 0, 6]]),
)
DATA = STATE.to_bytes()


def random_state(seed: int) -> State:
    """Of any shape, with and without each optional tensor, values at both sides of 2 bytes."""
    rng = random.Random(seed)
    b, s = rng.randint(1, 4), rng.randint(1, 5)
    limit = rng.choice([2, 2**16, 2**16 + 1, 2**31])

    def values(*shape: int) -> Tensor:
        count = int(np.prod(shape))
        chosen = [rng.choice([0, limit - 1, rng.randrange(limit)]) for _ in range(count)]
        return torch.tensor(chosen).view(shape)

    return State(
        values(b, s),
        rng.choice([0, 1, rng.randrange(2**31 - 5)]),
        values(b) if rng.random() < 0.5 else None,
        values(b, s) if rng.random() < 0.5 else None,
    )


def assert_same(actual: State, expected: State) -> None:
    assert actual.curr_pos == expected.curr_pos
    for name in ("tokens", "first_key", "input_pos"):
        x, y = getattr(actual, name), getattr(expected, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == torch.int64
            assert x.tolist() == y.tolist(), name


@pytest.mark.parametrize("seed", range(200))
def test_round_trips(seed):
    state = random_state(seed)
    data = state.to_bytes()
    assert_same(State.from_bytes(data), state)
    assert_same(State.from_bytes(bytearray(data)), state)
    assert_same(State.from_dict(json.loads(json.dumps(state.to_dict()))), state)
    assert state == State.from_bytes(data)


def test_random_states_cover_the_format():
    states = [random_state(seed) for seed in range(200)]
    forms = {state.to_bytes()[4:8] for state in states}
    assert len(forms) == 8  # 2 or 4 bytes; with and without each of two tensors


def test_bytes_are_as_documented():
    header = b"FSIS" + bytes([1, 4, 3, 0]) + struct.pack("<III", 2, 3, 7)
    values = [1, 2, 3, 4, 5, 70000, 0, 9, 3, 9, 1, 0, 0, 6]
    assert header + struct.pack("<14I", *values) == DATA
    short = State(torch.tensor([[65535], [1]]), 70000)
    header = b"FSIS" + bytes([1, 2, 0, 0]) + struct.pack("<III", 2, 1, 70000)
    assert short.to_bytes() == header + struct.pack("<2H", 65535, 1)


def test_a_step_is_as_small_after_100000_tokens_as_after_1():
    for place in (1, 100_000):
        plain = State(torch.tensor([[128_000]]), place)
        padded = State(torch.tensor([[128_000]]), place, torch.tensor([1]))
        assert [len(x.to_bytes()) for x in (plain, padded)] == [24, 28]
    assert len(State(torch.tensor([[65535]]), 100_000).to_bytes()) == 22


@pytest.mark.parametrize("seed", range(20))
def test_cut_off_or_longer_bytes_are_refused(seed):
    data = random_state(seed).to_bytes()
    for length in range(20):
        with pytest.raises(ValueError, match=f"^data must be at least 20 bytes, got {length}$"):
            State.from_bytes(data[:length])
    for other in (*(data[:length] for length in range(20, len(data))), data + b"\0", data * 2):
        message = rf"rows of \d tokens must be {len(data)} bytes, got {len(other)}$"
        with pytest.raises(ValueError, match=message):
            State.from_bytes(other)


def test_changed_bytes_are_refused_or_another_state():
    rng = random.Random(0)
    num_refused = 0
    for _ in range(3000):
        data = bytearray(random_state(rng.randrange(200)).to_bytes())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            state = State.from_bytes(data)
        except ValueError:
            num_refused += 1
            continue
        assert_same(State.from_bytes(state.to_bytes()), state)
    assert 1000 < num_refused < 2900


def changed(offset: int, value: bytes) -> bytes:
    return DATA[:offset] + value + DATA[offset + len(value) :]


MOST = 2**32 - 1
HUGE = struct.pack("<II", MOST, MOST)
LIMITS = r"must be in \[0, 2147483648\), got 2147483648"
WRONG_BYTES = {
    "magic": (changed(0, b"PK\3\4"), r"data must begin with b'FSIS', got b'PK\\x03\\x04'"),
    "version": (changed(4, b"\2"), "data must be of version 1 of the format, got 2"),
    "width": (changed(5, b"\10"), "integers of data must have 2 or 4 bytes, got 8"),
    "other width": (changed(5, b"\2"), "data of 2 rows of 3 tokens must be 48 bytes, got 76"),
    "flags": (changed(6, b"\4"), r"flags of data must be in \[0, 3\], got 4"),
    "high flags": (changed(7, b"\1"), r"flags of data must be in \[0, 3\], got 259"),
    "no rows": (changed(8, bytes(4)), "data must have at least one token, got 0 rows of 3"),
    "no tokens": (changed(12, bytes(4)), "data must have at least one token, got 2 rows of 0"),
    "huge": (changed(8, HUGE), f"data of {MOST} rows of {MOST} tokens must be "
             f"{20 + 4 * (2 * MOST**2 + MOST)} bytes, got 76"),
    "curr_pos": (changed(16, b"\377" * 4), rf"curr_pos must be in \[0, 2147483645\], got {MOST}"),
    "token": (changed(20, b"\0\0\0\200"), f"tokens {LIMITS}"),
    "first_key": (changed(44, b"\0\0\0\200"), f"first_key {LIMITS}"),
    "input_pos": (changed(52, b"\0\0\0\200"), f"input_pos {LIMITS}"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), WRONG_BYTES.values(), ids=WRONG_BYTES)
def test_wrong_bytes_are_named(data, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        State.from_bytes(data)


@pytest.mark.parametrize("data", [None, "FSIS", [1, 2], torch.zeros(20, dtype=torch.uint8)])
def test_what_is_not_bytes_is_refused(data):
    with pytest.raises(TypeError, match=f"^data must be bytes, got {type(data).__name__}$"):
        State.from_bytes(data)


def test_the_dict_has_what_is_needed_and_no_mask():
    assert State(torch.tensor([[5, 6]]), 3).to_dict() == {"tokens": [[5, 6]], "curr_pos": 3}
    assert STATE.to_dict() == {
        "tokens": [[1, 2, 3], [4, 5, 70000]],
        "curr_pos": 7,
        "first_key": [0, 9],
        "input_pos": [[3, 9, 1], [0, 0, 6]],
    }


def exo_dict(padding: list[int], num_tokens: int, curr_pos: int, room: int = 4) -> dict:
    """What exo's engine passes on, by torchtune's helpers: a mask and positions of all to come."""
    from torchtune.generation import (
        get_causal_mask_from_padding_mask,
        get_position_ids_from_padding_mask,
    )

    total = num_tokens + room
    is_token = torch.arange(total) >= torch.tensor(padding)[:, None]
    tokens = torch.arange(len(padding) * num_tokens).view(len(padding), num_tokens)
    return {
        "tokens": tokens.tolist(),
        "input_pos": get_position_ids_from_padding_mask(is_token).tolist(),
        "mask": get_causal_mask_from_padding_mask(is_token, target_seq_len=total + 2).tolist(),
        "curr_pos": curr_pos,
    }


@pytest.mark.parametrize("padding", [[0], [0, 0], [2], [3, 0], [1, 4]])
@pytest.mark.parametrize("curr_pos", [0, 5, 6])
def test_exos_dict_is_read_without_its_mask(padding, curr_pos):
    data = exo_dict(padding, 7, curr_pos)
    state = State.from_dict(json.loads(json.dumps(data)))
    tokens = torch.tensor(data["tokens"])[:, curr_pos:]
    first_key = torch.tensor(padding) if any(padding) else None
    assert_same(state, State(tokens, curr_pos, first_key))
    assert state.input_pos is None  # they are the counted ones
    assert set(state.to_dict()) <= {"tokens", "curr_pos", "first_key"}


def test_exos_mask_of_one_row_and_its_own_positions_are_kept():
    data = exo_dict([2], 5, 3)
    data["tokens"] = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    data["input_pos"] = [[7, 3, 1, 5, 2, 8]]
    data["first_key"] = [2, 2]
    state = State.from_dict(data)
    expected = State(
        torch.tensor([[3, 4], [8, 9]]), 3, torch.tensor([2, 2]), torch.tensor([[5, 2], [5, 2]])
    )
    assert_same(state, expected)


def exo(**changes) -> dict:
    return exo_dict([1], 4, 2) | changes


def mask_with(row: int, column: int) -> list:
    mask = torch.tensor(exo()["mask"])
    mask[0, row, column] ^= True
    return mask.tolist()


KEYS = "a state must have the keys tokens, curr_pos, and at most first_key, input_pos, mask, got "
MASK = "mask must be causal but for padding on the left: no other one travels, got "
SQUARE = torch.ones(1, 8, 8, dtype=torch.bool).tril()
WRONG_DICTS = {
    "empty": ({}, ValueError, f"{KEYS}none"),
    "no curr_pos": ({"tokens": [[1]]}, ValueError, f"{KEYS}tokens$"),
    "unknown": ({"tokens": [[1]], "curr_pos": 0, "first_keys": [0]}, ValueError,
                f"{KEYS}tokens, curr_pos, first_keys"),
    "tokens None": ({"tokens": None, "curr_pos": 0}, ValueError,
                    "tokens must be nested lists of numbers, got None"),
    "curr_pos None": ({"tokens": [[1]], "curr_pos": None}, TypeError,
                      "curr_pos must be an integer, got None"),
    "ragged": ({"tokens": [[1, 2], [3]], "curr_pos": 0}, ValueError,
               r"tokens must be nested lists of numbers, got \[\[1, 2\], \[3\]\]"),
    "text": ({"tokens": [[1]], "curr_pos": 0, "input_pos": "ab"}, ValueError,
             "input_pos must be nested lists of numbers, got 'ab'"),
    "floats": ({"tokens": [[1.0]], "curr_pos": 0}, TypeError, "tokens must be int64 or int32"),
    "exo's tokens": (exo(tokens=[1, 2]), ValueError,
                     r"tokens must be \[b, T\] beside a mask, got \[2\]"),
    "exo's curr_pos": (exo(curr_pos=4), ValueError,
                       r"curr_pos must be in \[0, 4\) for tokens beside a mask, got 4"),
    "exo's float curr_pos": (exo(curr_pos=2.0), TypeError,
                             r"curr_pos must be an integer, got 2\.0"),
    "exo's input_pos": (exo(input_pos=[[0, 1, 2]]), ValueError,
                        r"input_pos must be \[1 or 1, 4 or more\] beside a mask, got \[1, 3\]"),
    "mask of floats": (exo(mask=[[[1.0]]]), TypeError, r"mask must be bool, got torch\.float32"),
    "mask too small": (exo(mask=[[[True]]]), ValueError,
                       r"mask must be \[1 or 1, 4 or more, 4 or more\], got \[1, 1, 1\]"),
    "mask of 2 rows": (exo(mask=SQUARE.expand(2, 8, 8)), ValueError,
                       r"mask must be \[1 or 1, 4 or more, 4 or more\], got \[2, 8, 8\]"),
    "not causal": (exo(mask=mask_with(1, 6)), ValueError, rf"{MASK}True at \[0, 1, 6\]"),
    "a hole": (exo(mask=mask_with(3, 2)), ValueError, rf"{MASK}False at \[0, 3, 2\]"),
    "padding attended to": (exo(mask=mask_with(2, 0)), ValueError, rf"{MASK}True at \[0, 2, 0\]"),
    "other first_key": (exo(first_key=[2]), ValueError,
                        r"first_key must be that of the mask, \[1\], got \[2\]"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "message"), WRONG_DICTS.values(), ids=WRONG_DICTS)
def test_a_wrong_dict_is_named(data, error, message):
    with pytest.raises(error, match=f"^{message}"):
        State.from_dict(data)
