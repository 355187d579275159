"""An inference engine for exo: the methods of its ``InferenceEngine`` over a shard of fastshard.

    python examples/exo_engine.py "def " --cut 2 --tokens 20 --channel socket

runs the embedded model in two processes, layers 0-1 and 2-4, which hand hidden states on to each
other as exo's nodes do, over a socket on loopback or a pipe, and prints the text. All they need of
a channel is a function that sends bytes, and one that waits for them.

In an exo that has ``exo.inference.inference_engine.InferenceEngine``, derive the class from it and
give it exo's shard downloader; exo's ``Shard`` is taken as it is. Source of the contract:
exo-explore/exo, ``exo/inference/inference_engine.py`` and ``dummy_inference_engine.py``.
"""

import argparse
import asyncio
import io
import multiprocessing
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import torch

import fastshard
from fastshard import ShardInferenceState, ops
from fastshard.loading import TextModel, demo_model

T = TypeVar("T")
Send, Receive = Callable[[bytes], None], Callable[[], bytes]
DEMO = "demo"  # as a model_id: the embedded model
MAX_BYTES = 2**30  # of a message: who sends a larger length is no node


class FastshardInferenceEngine:
    """One shard on this process's device; of all methods of exo's engines those that infer.

    Each request is a prompt and what follows it. The cache holds one request at a time: a new
    prompt ends the one before.

    Args:
        shard_downloader: exo's: its ``await ensure_shard(shard, engine_name)`` gives the directory
            of the checkpoint. None: ``shard.model_id`` is a directory, a hub id, or ``demo``.
        device: As in ``fastshard.load``.
        dtype: As in ``fastshard.load``.
    """

    def __init__(
        self,
        shard_downloader: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.shard: fastshard.Shard | None = None
        self.model: TextModel | None = None
        self._downloader = shard_downloader
        self._placed = {"device": device, "dtype": dtype}
        self._executor = ThreadPoolExecutor(max_workers=1)  # one thread: calls stay in order
        self._request_id: str | None = None
        self._num_draws = 0

    async def encode(self, shard, prompt: str) -> np.ndarray:
        """Tokens of ``prompt``, ``[n]`` int64."""
        await self.ensure_shard(shard)
        return np.array(await self._run(self.model.tokenizer.encode, prompt), dtype=np.int64)

    async def decode(self, shard, tokens: np.ndarray) -> str:
        """Text of ``tokens``, ``[n]``."""
        await self.ensure_shard(shard)
        return await self._run(self.model.tokenizer.decode, np.asarray(tokens).ravel().tolist())

    async def sample(
        self, x: np.ndarray, temp: float = 0.6, top_k: int = 25, top_p: float = 1.0
    ) -> np.ndarray:
        """Draw a token for each row of the last logits of ``x``, ``[b, s, vocab_size]``: ``[b]``.

        ``temp=0`` takes the likeliest.
        """

        def draw() -> np.ndarray:
            logits = torch.from_numpy(x)[:, -1]
            step = torch.tensor(self._num_draws)
            self._num_draws += 1
            return ops.sample(logits, step, temperature=temp, top_k=top_k, top_p=top_p).numpy()

        return await self._run(draw)

    async def infer_prompt(
        self, request_id: str, shard, prompt: str, inference_state: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """``infer_tensor`` of the prompt's tokens."""
        tokens = await self.encode(shard, prompt)
        return await self.infer_tensor(request_id, shard, tokens[None], inference_state)

    async def infer_tensor(
        self, request_id: str, shard, input_data: np.ndarray, inference_state: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Run the shard's layers over the next tokens of a request.

        Args:
            request_id: Whose tokens they are.
            shard: The layers to run; loaded if they are not.
            input_data: ``[1, s]`` int64 tokens for a first shard; for others what the shard before
                returned, ``[1, s, hidden_size]``.
            inference_state: What came with them: of a first shard what the last one returned, and
                None or one without ``tokens`` begins a request.

        Returns:
            The hidden state, or after the last layer the logits of the last token, ``[1, 1,
            vocab_size]``; and the state, ``ShardInferenceState.to_dict``. bfloat16, which numpy
            does not have, travels as float32, which holds each of its values.

        Raises:
            RuntimeError: another request was begun since.
        """
        await self.ensure_shard(shard)
        return await self._run(self._infer, request_id, input_data, inference_state or {})

    async def ensure_shard(self, shard) -> None:
        """Load the shard's layers, and no others, unless they are loaded."""
        shard = fastshard.Shard.from_dict(shard.to_dict())
        if shard == self.shard:
            return
        if self._downloader is not None:
            source = await self._downloader.ensure_shard(shard, type(self).__name__)
        else:
            source = demo_model() if shard.model_id == DEMO else shard.model_id
        await self._run(self._load, shard, source)

    async def load_checkpoint(self, shard, path: str) -> None:
        """Load the shard's layers of the checkpoint in the directory ``path``."""
        await self._run(self._load, fastshard.Shard.from_dict(shard.to_dict()), path)

    def _load(self, shard: fastshard.Shard, source) -> None:
        self.shard = self.model = self._request_id = None  # its memory is free before more is taken
        self.model = fastshard.load(source, shard=shard, **self._placed)
        self.shard = shard

    def _infer(self, request_id: str, data: np.ndarray, given: dict) -> tuple[np.ndarray, dict]:
        x, hidden = torch.from_numpy(data), None
        begun = given.get("tokens") is not None
        state = ShardInferenceState.from_dict(given) if begun else None
        if self.shard.is_first_layer():
            state = state.advance(x) if begun else ShardInferenceState(x)
        else:
            hidden = x.to(self.model.dtype)
        if state.curr_pos == 0:
            self._request_id = request_id
        elif request_id != self._request_id:
            raise RuntimeError(
                f"request {request_id} cannot go on: the cache holds request {self._request_id}"
            )
        hidden, logits = state.run(self.model, hidden)
        out = logits if hidden is None else hidden
        out = out.float() if out.dtype == torch.bfloat16 else out
        return out.numpy(force=True), state.to_dict()

    async def _run(self, function: Callable[..., T], *arguments) -> T:
        """Call ``function`` in the engine's thread, so that the event loop goes on meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)


def pack(data: np.ndarray, state: dict) -> bytes:
    """A message: the state's bytes after their number, then ``data`` as in a .npy file."""
    head = ShardInferenceState.from_dict(state).to_bytes()
    array = io.BytesIO()
    np.save(array, data, allow_pickle=False)
    return struct.pack("<I", len(head)) + head + array.getvalue()


def unpack(message: bytes) -> tuple[np.ndarray, dict]:
    """Inverse of ``pack``; nothing in the message is executed."""
    start, (size,) = struct.calcsize("<I"), struct.unpack_from("<I", message)
    state = ShardInferenceState.from_bytes(message[start : start + size])
    return np.load(io.BytesIO(message[start + size :]), allow_pickle=False), state.to_dict()


class SocketEnd:
    """One end of a connection with the two functions of a pipe's: messages after their lengths."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small, and awaited
        self._connection = connection
        self.close = connection.close

    def send_bytes(self, message: bytes) -> None:
        self._connection.sendall(struct.pack("<Q", len(message)) + message)

    def recv_bytes(self) -> bytes:
        """Wait for a message.

        Raises:
            EOFError: the other end is closed.
            ValueError: the message is too long.
        """
        (size,) = struct.unpack("<Q", self._read(8))
        if size > MAX_BYTES:
            raise ValueError(f"a message must have at most {MAX_BYTES} bytes, got {size}")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            parts.append(self._connection.recv(min(size, 2**20)))
            if not parts[-1]:
                raise EOFError
            size -= len(parts[-1])
        return b"".join(parts)


def connect(channel: str) -> tuple[Connection | SocketEnd, Connection | SocketEnd]:
    """Two ends of a pipe, or of a socket on loopback; each may go to a process of its own."""
    if channel == "pipe":
        return multiprocessing.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return SocketEnd(here), SocketEnd(server.accept()[0])


async def lead(
    engine: FastshardInferenceEngine,
    shard: fastshard.Shard,
    prompt: str,
    num_tokens: int,
    send: Send,
    receive: Receive,
) -> tuple[list[int], str]:
    """The node of the first layers: hidden states out, tokens in. Returns them, and their text."""
    tokens: list[int] = []
    data, state = await engine.infer_prompt("request", shard, prompt)
    while True:
        send(pack(data, state))
        token, state = unpack(receive())
        tokens.append(int(token[0, 0]))
        if len(tokens) == num_tokens:
            return tokens, await engine.decode(shard, np.array(tokens))
        data, state = await engine.infer_tensor("request", shard, token, state)


async def follow(
    engine: FastshardInferenceEngine, shard: fastshard.Shard, send: Send, receive: Receive
) -> None:
    """The node of the last layers: hidden states in, tokens out, until the channel is closed."""
    while True:
        try:
            data, state = unpack(receive())
        except EOFError:
            return
        logits, state = await engine.infer_tensor("request", shard, data, state)
        send(pack((await engine.sample(logits, temp=0.0))[:, None], state))


def second_process(shard: fastshard.Shard, end: Connection | SocketEnd, device: str) -> None:
    engine = FastshardInferenceEngine(device=device)
    asyncio.run(follow(engine, shard, end.send_bytes, end.recv_bytes))


def generate(
    prompt: str,
    cut: int,
    num_tokens: int,
    channel: str = "pipe",
    devices: tuple[str, str] = ("cpu", "cpu"),
) -> tuple[list[int], str]:
    """Continue ``prompt`` greedily by two processes, of layers 0 to cut - 1 and from cut on."""
    num_layers = fastshard.checkpoint.Checkpoint(demo_model()).config.num_layers
    first = fastshard.Shard(DEMO, 0, cut - 1, num_layers)
    last = fastshard.Shard(DEMO, cut, num_layers - 1, num_layers)
    end, other_end = connect(channel)
    process = multiprocessing.get_context("spawn").Process(
        target=second_process, args=(last, other_end, devices[1])
    )
    process.start()
    other_end.close()  # the process has it: when it dies, the next read says so
    engine = FastshardInferenceEngine(device=devices[0])
    try:
        return asyncio.run(lead(engine, first, prompt, num_tokens, end.send_bytes, end.recv_bytes))
    finally:
        end.close()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--cut", type=int, default=2, help="first layer of the second process")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--channel", choices=["pipe", "socket"], default="pipe")
    parser.add_argument("--devices", nargs=2, default=["cpu", "cpu"])
    args = parser.parse_args()
    print(args.prompt + generate(args.prompt, args.cut, args.tokens, args.channel, args.devices)[1])


if __name__ == "__main__":
    main()
