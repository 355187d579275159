"""Generation: shards chained in one process, and text as it comes."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastshard.checkpoint import GenerationDefaults, TextTokenizer
from fastshard.decode import PromptGraphs, check_mode
from fastshard.models import ModelConfig, ShardedGeneralModel
from fastshard.prompts import Prompt, choose_sampling, encode_prompt
from fastshard.sampling import Sampling
from fastshard.text import Continuation
from fastshard.token_loop import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_PREFILL_CHUNK_SIZE,
    check_chunk_size,
    check_room,
    read_behind,
    token_steps,
)

if TYPE_CHECKING:
    from fastshard.pipeline import Texts


class TextGenerator:
    """``stream`` for what has these attributes and a ``generate`` that ends in logits."""

    config: ModelConfig
    tokenizer: TextTokenizer | None
    generation_defaults: GenerationDefaults
    prompt_graphs: PromptGraphs | None = None

    def capture_prompts(self, lengths: Sequence[int]) -> None:
        """Run prompts from CUDA graphs from now on: for many short ones, or a slow host.

        A prompt of ``stream``, or the only one of ``generate_batch``, takes the graph of the least
        length that holds it, and is computed up to that length; longer ones run as before. A graph
        is captured at its first prompt, which takes twice the time of an ordinary one, and has
        memory of its own for the activations of its length.

        Args:
            lengths: Tokens, as ``(64, 256, 1024)``.

        Raises:
            ValueError: a length is not in 1 to the context, or there is none; or the model is not
                on a GPU.
        """
        self._check_whole("capture_prompts")
        self.prompt_graphs = PromptGraphs(self, lengths)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        decode: str | None = None,
        prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
    ) -> "TextStream":
        """Continue ``prompt``, piece by piece.

        Args:
            prompt: Text; with ``chat`` also a conversation, dicts with ``role`` and ``content``.
            max_new_tokens: At most; also ends where the context is full.
            temperature: 0 is greedy. None, here and below: as the checkpoint's
                ``generation_config.json`` says, greedy where it says nothing.
            top_k: Only this many likeliest tokens; 0 is all.
            top_p: Only the likeliest tokens that together reach this probability.
            min_p: Only tokens at least this likely, relative to the likeliest.
            seed: The same seed gives the same text.
            stop: The text ends before the first of these strings.
            chat: Put the prompt into the checkpoint's chat template.
            decode: ``auto``, ``persistent``, ``graph`` or ``eager``, see ``fastshard.decode``;
                None: as ``FASTSHARD_DECODE`` says, else auto.
            prefill_chunk_size: At most so many tokens of the prompt at a time, for the memory that
                they take beside the cache.

        Returns:
            An iterator over pieces of text, whole characters each.

        Raises:
            ValueError: a setting out of its range, no tokenizer, or a prompt that is empty or does
                not fit the context.
        """
        self._check_whole("stream")
        tokens = encode_prompt(self.tokenizer, prompt, chat)
        sampling = choose_sampling(
            self.generation_defaults,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        mode = check_mode(decode)
        return TextStream(self, tokens, max_new_tokens, sampling, stops, mode, prefill_chunk_size)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        decode: str | None = None,
        prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
        in_flight: int = 1,
    ) -> "Texts":
        """Continue many prompts, in their order, piece by piece.

        Each has its own cache and its own sampling: its text is that of ``stream`` with the seed
        ``seed + index``, whatever is generated beside it. In one process that is no faster than one
        prompt after another; ``fastshard.pipeline`` does the same over many.

        Args:
            prompts: As ``stream`` takes one, each.
            seed: Of the first prompt; each other has the next one.
            in_flight: Prompts that are generated in turns. Others wait until one of these ends.

        The other arguments are those of ``stream``, for each prompt.

        Returns:
            An iterator over ``(index, piece)``: all pieces of a text before those of the next, at
            least one each, which may be empty.

        Raises:
            ValueError: as ``stream``; there are no prompts, or ``in_flight`` is below 1.
            TypeError: ``prompts`` is one string, or one of them no text.
        """
        from fastshard.pipeline import generate_in_process, text_requests

        self._check_whole("generate_many")
        requests = text_requests(
            prompts,
            self.tokenizer,
            self.generation_defaults,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            chat=chat,
        )
        return generate_in_process(
            self, requests, in_flight=in_flight, chunk_size=prefill_chunk_size, mode=decode
        )

    def _check_whole(self, caller: str) -> None:
        """Raise where this is no whole model, as `caller` needs."""


class ShardChain(TextGenerator):
    """Shards that together are one model: each passes its hidden state on to the next.

    Args:
        models: In the order of their layers; of one config, each on its own device.

    Raises:
        ValueError: they leave a layer out, or hold one twice.
    """

    def __init__(self, models: Sequence[ShardedGeneralModel]):
        spans = [(m.shard.start_layer, m.shard.end_layer) for m in models]
        num_layers = models[0].config.num_layers if models else 0
        starts = [0] + [end + 1 for _, end in spans]
        if not models or starts != [start for start, _ in spans] + [num_layers]:
            raise ValueError(
                f"shards must hold each of {num_layers} layers once, in order, got layers "
                + ",".join(f"{start}-{end}" for start, end in spans)
            )
        self.models: list[ShardedGeneralModel] = list(models)
        self.config: ModelConfig = models[0].config
        self.tokenizer: TextTokenizer | None = getattr(models[0], "tokenizer", None)
        self.generation_defaults: GenerationDefaults = getattr(
            models[0], "generation_defaults", GenerationDefaults()
        )

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self.models[0].device

    @property
    def decode_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all but an embedding that is no head."""
        return sum(
            weight.numel() * weight.element_size()
            for model in self.models
            for name, weight in model.model.named_parameters()
            if name != "tok_embeddings.weight"
            or (self.config.tie_word_embeddings and model.shard.is_last_layer())
        )

    def generate(self, tokens: Tensor, **arguments: Any) -> tuple[None, Tensor]:
        """``ShardedGeneralModel.generate`` of all shards in turn: logits."""
        hidden, logits = self.models[0].generate(tokens, **arguments)
        for model in self.models[1:]:
            moved = {
                name: value.to(model.device) if isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
            hidden, logits = model.generate(hidden_state=hidden.to(model.device), **moved)
        return hidden, logits


class TextStream:
    """An iterator over the pieces of one generated text, which counts as it goes.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: Tokens generated so far, an end token included.
        prefill_seconds: Up to the first token.
        decode_seconds: From the first token to the last.
    """

    def __init__(
        self,
        model: TextGenerator,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
        mode: str = "auto",
        prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
    ):
        self.num_prompt_tokens: int = len(prompt)
        self.num_tokens: int = 0
        self.prefill_seconds: float = 0.0
        self.decode_seconds: float = 0.0
        room = check_room(model, [prompt], max_new_tokens)
        check_chunk_size(prefill_chunk_size)
        defaults = model.generation_defaults
        decode = model.tokenizer.decode
        self._text = Continuation(decode, prompt, defaults.eos_tokens, stops)
        steps = token_steps(model, [prompt], room, sampling, mode, prefill_chunk_size)
        self._steps = read_behind(steps)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        start = time.perf_counter()
        for (token,) in self._steps:
            passed = time.perf_counter() - start
            if self.num_tokens == 0:
                self.prefill_seconds = passed
            self.decode_seconds = passed - self.prefill_seconds
            self.num_tokens += 1
            text = self._text.push(token)
            if text:
                yield text
            if self._text.ended:
                break
        rest = self._text.finish()
        if rest:
            yield rest
