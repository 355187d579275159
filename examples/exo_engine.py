"""An inference engine for exo: the methods of its ``InferenceEngine`` over a shard of fastshard.

    python examples/exo_engine.py "def " --cut 2 --tokens 20

runs the embedded model in two processes, layers 0-1 and 2-4, which hand hidden states on to each
other as exo's nodes do, and prints the text.

In an exo that has ``exo.inference.inference_engine.InferenceEngine``, derive the class from it and
give it exo's shard downloader; exo's ``Shard`` is taken as it is. Source of the contract:
exo-explore/exo, ``exo/inference/inference_engine.py`` and ``dummy_inference_engine.py``.
"""

import argparse
import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import torch

import fastshard
from fastshard import ops
from fastshard.loading import TextModel, demo_model

T = TypeVar("T")
DEMO = "demo"  # as a model_id: the embedded model


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
            inference_state: What the call before returned; None begins a request.

        Returns:
            The hidden state, or after the last layer the logits of the last token, ``[1, 1,
            vocab_size]``; and the state, plain values that JSON can hold. bfloat16, which numpy
            does not have, travels as float32, which holds each of its values.

        Raises:
            RuntimeError: another request was begun since.
        """
        await self.ensure_shard(shard)
        return await self._run(self._infer, request_id, input_data, dict(inference_state or {}))

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

    def _infer(self, request_id: str, data: np.ndarray, state: dict) -> tuple[np.ndarray, dict]:
        start = state.setdefault("curr_pos", 0)
        if start == 0:
            self._request_id = request_id
        elif request_id != self._request_id:
            raise RuntimeError(
                f"request {request_id} cannot go on: the cache holds request {self._request_id}"
            )
        x = torch.from_numpy(data).to(self.model.device)
        is_first, is_last = self.shard.is_first_layer(), self.shard.is_last_layer()
        inputs = {"tokens": x} if is_first else {"hidden_state": x.to(self.model.dtype)}
        hidden, logits = self.model.generate(**inputs, curr_pos=start, num_logits=1)
        if is_last:  # the tokens of this call are through: the next ones follow them
            state["curr_pos"] = start + data.shape[1]
        out = logits if is_last else hidden
        return (out.float() if out.dtype == torch.bfloat16 else out).numpy(force=True), state

    async def _run(self, function: Callable[..., T], *arguments) -> T:
        """Call ``function`` in the engine's thread, so that the event loop goes on meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)


def node(shard: fastshard.Shard, inbox: Connection, outbox: Connection, device: str) -> None:
    """What a node of exo does with its engine: run what comes in through a shard, hand it on.

    A first shard gets the prompt, then tokens; the last sends tokens, with the text so far.
    """

    async def serve() -> None:
        engine = FastshardInferenceEngine(device=device)
        tokens: list[int] = []
        while (message := inbox.recv()) is not None:
            data, state = message
            infer = engine.infer_prompt if isinstance(data, str) else engine.infer_tensor
            data, state = await infer("request", shard, data, state)
            if shard.is_last_layer():
                token = await engine.sample(data, temp=0.0)
                tokens.append(int(token[0]))
                text = await engine.decode(shard, np.array(tokens))
                outbox.send((token[None], state, text))
            else:
                outbox.send((data, state))
        if not shard.is_last_layer():
            outbox.send(None)

    asyncio.run(serve())


def generate(prompt: str, cut: int, num_tokens: int, device: str = "cpu") -> tuple[list[int], str]:
    """Continue ``prompt`` greedily by two processes, of layers 0 to cut - 1 and from cut on."""
    num_layers = fastshard.checkpoint.Checkpoint(demo_model()).config.num_layers
    shards = [
        fastshard.Shard(DEMO, 0, cut - 1, num_layers),
        fastshard.Shard(DEMO, cut, num_layers - 1, num_layers),
    ]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]  # to the first, between, from the last
    nodes = [
        context.Process(target=node, args=(shard, pipes[i][0], pipes[i + 1][1], device))
        for i, shard in enumerate(shards)
    ]
    for process in nodes:
        process.start()
    to_first, from_last = pipes[0][1], pipes[2][0]
    for end in (pipes[0][0], *pipes[1], pipes[2][1]):
        end.close()  # the nodes have theirs: when one dies, the next read says so
    tokens, text, message = [], "", (prompt, None)
    for _ in range(num_tokens):
        to_first.send(message)
        token, state, text = from_last.recv()
        tokens.append(int(token[0, 0]))
        message = (token, state)
    to_first.send(None)
    for process in nodes:
        process.join()
    return tokens, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--cut", type=int, default=2, help="first layer of the second process")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(args.prompt + generate(args.prompt, args.cut, args.tokens, args.device)[1])


if __name__ == "__main__":
    main()
