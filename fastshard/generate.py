"""Generation: shards chained in one process, the token loop, and text as it comes."""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastshard.checkpoint import GenerationDefaults, TextTokenizer
from fastshard.models import ModelConfig, ShardedGeneralModel
from fastshard.sampling import Sampling
from fastshard.text import Detokenizer, StopFilter

DEFAULT_NEW_TOKENS = 128


class TextGenerator:
    """``stream`` for what has these attributes and a ``generate`` that ends in logits."""

    config: ModelConfig
    tokenizer: TextTokenizer | None
    generation_defaults: GenerationDefaults

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
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

        Returns:
            An iterator over pieces of text, whole characters each.

        Raises:
            ValueError: a setting out of its range, no tokenizer, or a prompt that is empty or does
                not fit the context.
        """
        if self.tokenizer is None:
            raise ValueError("stream needs a tokenizer, and the checkpoint has no tokenizer.json")
        if chat:
            tokens = self.tokenizer.encode_chat(prompt)
        elif isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        else:
            raise TypeError(f"prompt must be a string without chat, got {type(prompt).__name__}")
        defaults = self.generation_defaults
        sampling = Sampling(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=defaults.min_p if min_p is None else min_p,
            seed=seed,
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        return TextStream(self, tokens, max_new_tokens, sampling, stops)


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
        self.models = list(models)
        self.config = models[0].config
        self.tokenizer = getattr(models[0], "tokenizer", None)
        self.generation_defaults = getattr(models[0], "generation_defaults", GenerationDefaults())

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

    def generate(self, tokens: Tensor, **arguments) -> tuple[None, Tensor]:
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
    ):
        self.num_prompt_tokens, self.num_tokens = len(prompt), 0
        self.prefill_seconds = self.decode_seconds = 0.0
        room = check_room(model.config, len(prompt), max_new_tokens)
        self._steps = _read_behind(token_steps(model, [prompt], room, sampling))
        self._eos_tokens = set(model.generation_defaults.eos_tokens)
        self._detokenizer = Detokenizer(model.tokenizer.decode, prompt)
        self._stop_filter = StopFilter(stops)
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
            if token in self._eos_tokens:
                break
            text = self._stop_filter.push(self._detokenizer.push(token))
            if text:
                yield text
            if self._stop_filter.stopped:
                return
        rest = self._stop_filter.push(self._detokenizer.finish()) + self._stop_filter.finish()
        if rest:
            yield rest


def generate_batch(
    model: ShardedGeneralModel | ShardChain,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: Sampling | None = None,
    eos_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """Continue several prompts at once, padded on the left to one length.

    Args:
        model: All layers, with a cache.
        prompts: Tokens of each.
        eos_tokens: A row ends after the first of these.

    Returns:
        The new tokens of each prompt, its end token included.

    Raises:
        ValueError: no prompts, or one that is empty or does not fit the context.
    """
    if not prompts:
        raise ValueError("prompts must have at least one prompt, got none")
    check_room(model.config, min(map(len, prompts)), max_new_tokens)
    room = check_room(model.config, max(map(len, prompts)), max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(rows)
    for step in _read_behind(token_steps(model, prompts, room, sampling or Sampling())):
        for i, token in enumerate(step):
            if not ended[i]:
                rows[i].append(token)
                ended[i] = token in eos_tokens
        if all(ended):
            break
    return rows


def check_room(config: ModelConfig, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens may follow the prompt.

    Raises:
        ValueError: the prompt is empty or fills the context, or ``max_new_tokens`` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_prompt_tokens == 0:
        raise ValueError("prompt must have at least one token, got none")
    if num_prompt_tokens >= config.max_seq_len:
        raise ValueError(
            f"prompt must be shorter than the context of {config.max_seq_len} tokens, "
            f"got {num_prompt_tokens}"
        )
    return min(max_new_tokens, config.max_seq_len - num_prompt_tokens)


def token_steps(
    model: ShardedGeneralModel | ShardChain,
    prompts: Sequence[Sequence[int]],
    num_steps: int,
    sampling: Sampling,
) -> Iterator[Tensor]:
    """Prefill, then decode one token a row and step; yields ``[b]`` on the device, never waits.

    Rows are padded on the left: ``first_key`` keeps the padding out of the attention, and positions
    count from there.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    first_key = torch.tensor(padding, device=model.device) if any(padding) else None
    for shard in model.models if isinstance(model, ShardChain) else [model]:
        shard.max_generated_tokens = max(shard.max_generated_tokens, num_steps)
    _, logits = model.generate(tokens, first_key=first_key, num_logits=1)
    step = torch.zeros((), dtype=torch.int64, device=logits.device)
    for i in range(num_steps):
        chosen = sampling.choose(logits[:, -1], step)
        yield chosen
        if i + 1 < num_steps:
            step += 1
            _, logits = model.generate(
                chosen[:, None].to(model.device),
                curr_pos=longest + i,
                first_key=first_key,
                num_logits=1,
            )


def _read_behind(steps: Iterator[Tensor]) -> Iterator[list[int]]:
    """Each step's tokens on the host; on a GPU one step late, so that it never waits."""
    previous = None
    for tokens in steps:
        if tokens.device.type == "cpu":
            yield tokens.tolist()
            continue
        if previous is not None:
            yield previous.tolist()
        previous = tokens
    if previous is not None:
        yield previous.tolist()
