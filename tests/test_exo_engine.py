"""The example engine for exo: two processes give the whole model's tokens; its methods, its errors.

exo is not installed: its ``Shard`` and its downloader are written down here as it uses them.
"""

import asyncio
import inspect
import io
import json
import multiprocessing
import queue
import random
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import write_byte_checkpoint

import fastshard
from fastshard.loading import demo_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPT = "import os\n\n\ndef "


@dataclass(frozen=True)
class ExoShard:
    """exo's own class: the same fields, another type."""

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int

    def to_dict(self) -> dict:
        return asdict(self)


FIRST, LAST = ExoShard("demo", 0, 1, 5), ExoShard("demo", 2, 4, 5)


@pytest.fixture(scope="module")
def exo_engine():
    """The example as a module that a spawned process finds too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import exo_engine

        yield exo_engine
        del sys.modules["exo_engine"]


@pytest.fixture(scope="module")
def whole():
    return fastshard.load(device="cpu")


def greedy(model, num_tokens: int) -> list[int]:
    prompt = model.tokenizer.encode(PROMPT)
    (tokens,) = fastshard.generate_batch(model, [prompt], max_new_tokens=num_tokens)
    return tokens


def engines(module, count=2, **settings):
    return [module.FastshardInferenceEngine(device="cpu", **settings) for _ in range(count)]


@pytest.mark.parametrize(("cut", "channel"), [(1, "pipe"), (4, "socket")])
def test_two_processes_give_the_tokens_of_the_whole_model(exo_engine, whole, cut, channel):
    expected = greedy(whole, 16)
    assert len(set(expected)) > 4
    tokens, text = exo_engine.generate(PROMPT, cut, 16, channel)
    assert tokens == expected
    assert text == whole.tokenizer.decode(expected)
    assert multiprocessing.active_children() == []


def test_it_runs_as_a_script(whole):
    command = [sys.executable, str(EXAMPLES / "exo_engine.py"), PROMPT]
    command += ["--cut", "3", "--tokens", "8", "--channel", "socket"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == f"{PROMPT}{whole.tokenizer.decode(greedy(whole, 8))}\n", result.stderr


@pytest.mark.parametrize("channel", ["pipe", "socket"])
def test_a_node_that_dies_ends_the_loop(exo_engine, channel):
    with pytest.raises(EOFError):
        exo_engine.generate(PROMPT, 2, 2, channel, ("cpu", "cuda:99"))
    assert multiprocessing.active_children() == []


def test_a_first_node_that_fails_ends_the_other(exo_engine):
    with pytest.raises(RuntimeError, match="device cuda:99 is not there"):
        exo_engine.generate(PROMPT, 2, 2, devices=("cuda:99", "cpu"))
    assert multiprocessing.active_children() == []


def test_any_two_functions_are_a_channel(exo_engine, whole):
    """Two queues; what goes over them is the prompt once, then one token and one hidden state."""
    first, last = engines(exo_engine)
    to_last, to_first, sent = queue.Queue(), queue.Queue(), {"first": [], "last": []}

    def sending(name: str, into: queue.Queue):
        return lambda message: (sent[name].append(message), into.put(message))

    def receiving() -> bytes:
        message = to_last.get(timeout=60)
        if message is None:
            raise EOFError
        return message

    node = exo_engine.follow(last, LAST, sending("last", to_first), receiving)
    executor = ThreadPoolExecutor(max_workers=1)
    following = executor.submit(asyncio.run, node)
    send, receive = sending("first", to_last), partial(to_first.get, timeout=60)
    tokens, _ = asyncio.run(exo_engine.lead(first, FIRST, PROMPT, 8, send, receive))
    to_last.put(None)
    assert following.result(timeout=60) is None
    assert tokens == greedy(whole, 8)
    num_tokens = len(whole.tokenizer.encode(PROMPT))
    npy = 128  # the header of an array
    hidden, state = 256 * 4, 20  # float32 of the demo model; before its tokens of 2 bytes
    prompt = 4 + state + num_tokens * (2 + hidden) + npy
    assert [len(message) for message in sent["first"]] == [prompt] + [4 + 22 + hidden + npy] * 7
    answer = 4 + state + num_tokens * 2 + npy + 8
    assert [len(message) for message in sent["last"]] == [answer] + [4 + 22 + npy + 8] * 7


def test_a_message_holds_an_array_and_a_state(exo_engine):
    data = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float16)
    state = {"tokens": [[1, 2, 3]], "curr_pos": 4}
    message = exo_engine.pack(data, state)
    array, found = exo_engine.unpack(message)
    np.testing.assert_array_equal(array, data)
    assert array.dtype == data.dtype
    assert found == state
    with pytest.raises(ValueError, match="allow_pickle"):
        exo_engine.pack(np.array([object()]), state)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}]))
    with pytest.raises(ValueError, match="allow_pickle"):
        exo_engine.unpack(message[: 4 + 26] + pickled.getvalue())
    with pytest.raises(ValueError, match=r"^data must begin with b'FSIS', got b'FSIR'$"):
        exo_engine.unpack(message.replace(b"FSIS", b"FSIR"))


def test_a_socket_carries_messages_of_any_length(exo_engine):
    one, other = exo_engine.connect("socket")
    assert isinstance(one, exo_engine.SocketEnd)
    for end in (one, other):
        end._connection.settimeout(60)  # and a call of the system sends a part only
    other.send_bytes(b"back")
    assert one.recv_bytes() == b"back"
    messages = [b"", b"a", random.Random(0).randbytes(5_000_000), b"end"]

    def send() -> None:
        for message in messages:
            one.send_bytes(message)
        one._connection.sendall(struct.pack("<Q", 3) + b"ab")  # the third byte does not come
        one.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert [other.recv_bytes() for _ in messages] == messages
    with pytest.raises(EOFError):
        other.recv_bytes()
    sender.join()
    other.close()


def test_a_socket_takes_no_length_that_is_no_message(exo_engine):
    one, other = exo_engine.connect("socket")
    one._connection.sendall(struct.pack("<Q", 2**30 + 1))
    one.close()
    message = "^a message must have at most 1073741824 bytes, got 1073741825$"
    with pytest.raises(ValueError, match=message):
        other.recv_bytes()
    other.close()


def test_it_has_the_methods_of_an_engine(exo_engine):
    engine = exo_engine.FastshardInferenceEngine
    first_arguments = {
        "encode": ["shard", "prompt"],
        "sample": ["x"],
        "decode": ["shard", "tokens"],
        "infer_tensor": ["request_id", "shard", "input_data", "inference_state"],
        "infer_prompt": ["request_id", "shard", "prompt", "inference_state"],
        "load_checkpoint": ["shard", "path"],
        "ensure_shard": ["shard"],
    }
    for name, arguments in first_arguments.items():
        method = getattr(engine, name)
        assert inspect.iscoroutinefunction(method), name
        found = list(inspect.signature(method).parameters)
        assert found[1 : len(arguments) + 1] == arguments


def test_each_engine_holds_its_own_layers(exo_engine, whole):
    first, last = engines(exo_engine)

    async def run():
        tokens = await first.encode(FIRST, PROMPT)
        hidden, state = await first.infer_tensor("a", FIRST, tokens[None])
        assert json.loads(json.dumps(state)) == {"curr_pos": 0, "tokens": [tokens.tolist()]}
        return tokens, hidden, *await last.infer_tensor("a", LAST, hidden, state)

    tokens, hidden, logits, state = asyncio.run(run())
    assert sorted(first.model.model.layers) == ["0", "1"]
    assert sorted(last.model.model.layers) == ["2", "3", "4"]
    assert tokens.tolist() == whole.tokenizer.encode(PROMPT)
    assert state == {"curr_pos": 0, "tokens": [tokens.tolist()]}
    _, expected = whole.generate(torch.from_numpy(tokens[None]), num_logits=1)
    assert hidden.shape == (1, len(tokens), 256)
    np.testing.assert_array_equal(logits, expected.numpy())


def test_bfloat16_travels_without_loss(exo_engine):
    whole = fastshard.load(device="cpu", dtype=torch.bfloat16)
    first, last = engines(exo_engine, dtype=torch.bfloat16)

    async def run():
        hidden, state = await first.infer_prompt("a", FIRST, PROMPT)
        assert hidden.dtype == np.float32
        return (await last.infer_tensor("a", LAST, hidden, state))[0]

    tokens = torch.tensor([whole.tokenizer.encode(PROMPT)])
    _, expected = whole.generate(tokens, num_logits=1)
    np.testing.assert_array_equal(asyncio.run(run()), expected.numpy())


def test_a_request_that_another_one_replaced_is_refused(exo_engine):
    (engine,) = engines(exo_engine, 1)
    shard = ExoShard("demo", 0, 4, 5)

    message = "^request a cannot go on: the cache holds request b$"

    async def run():
        _, state = await engine.infer_prompt("a", shard, PROMPT)
        logits, other = await engine.infer_prompt("b", shard, "x = ")
        token = await engine.sample(logits, temp=0)
        with pytest.raises(RuntimeError, match=message):
            await engine.infer_tensor("a", shard, token[None], state)
        again, _ = await engine.infer_tensor("b", shard, token[None], other)
        return again

    assert asyncio.run(run()).shape == (1, 1, 2048)


def test_a_step_says_its_place_and_a_state_without_tokens_begins_anew(exo_engine, whole):
    (engine,) = engines(exo_engine, 1)
    shard = ExoShard("demo", 0, 4, 5)
    prompt = whole.tokenizer.encode(PROMPT)

    async def run():
        logits, state = await engine.infer_prompt("a", shard, PROMPT, {})
        tokens = []
        for i in range(4):
            token = (await engine.sample(logits, temp=0))[:, None]
            tokens.append(int(token[0, 0]))
            logits, state = await engine.infer_tensor("a", shard, token, state)
            assert state == {"curr_pos": len(prompt) + i, "tokens": token.tolist()}
        _, state = await engine.infer_prompt("b", shard, PROMPT, {"tokens": None})
        assert state == {"curr_pos": 0, "tokens": [prompt]}
        return tokens

    assert asyncio.run(run()) == greedy(whole, 4)


def test_sample_draws_anew_and_greedily(exo_engine):
    (engine,) = engines(exo_engine, 1)
    logits = np.zeros((2, 3, 50), dtype=np.float32)
    logits[0, -1, 7] = logits[1, -1, 9] = 1.0
    logits[:, 0, 3] = 9.0  # of an earlier token

    async def run():
        greedy = await engine.sample(logits, temp=0)
        drawn = [tuple(await engine.sample(logits, temp=1.0, top_k=0)) for _ in range(20)]
        two = [int((await engine.sample(logits, temp=1.0, top_k=1))[0]) for _ in range(5)]
        return greedy, drawn, two

    greedy, drawn, one = asyncio.run(run())
    assert greedy.tolist() == [7, 9]
    assert len(set(drawn)) > 10
    assert one == [7] * 5


def test_a_downloader_and_a_checkpoint_say_where_the_weights_are(exo_engine, tmp_path):
    path = tmp_path / "model"
    write_byte_checkpoint(path)
    asked = []

    class Downloader:
        async def ensure_shard(self, shard, engine_name):
            asked.append((shard.model_id, engine_name))
            return path

    engine = exo_engine.FastshardInferenceEngine(Downloader(), device="cpu")
    shard = ExoShard("tiny", 0, 2, 3)

    async def run():
        tokens = await engine.encode(shard, "ab")
        assert await engine.decode(shard, tokens) == "ab"
        assert asked == [("tiny", "FastshardInferenceEngine")]
        assert engine.model.config.num_layers == 3
        await engine.load_checkpoint(LAST, str(demo_model()))
        await engine.ensure_shard(LAST)

    asyncio.run(run())
    assert len(asked) == 1
    assert sorted(engine.model.model.layers) == ["2", "3", "4"]
