"""Texts: many prompts' continuations, in their order, piece by piece."""

import time
from collections.abc import Callable, Iterator, Sequence

from fastshard.checkpoint import GenerationDefaults, TextTokenizer
from fastshard.prompts import Prompt, choose_sampling, encode_prompt
from fastshard.sampling import Sampling
from fastshard.text import Continuation
from fastshard.token_loop import DEFAULT_NEW_TOKENS

_NUM_SEEDS = 2**63


class TextRequest:
    """One prompt, and the text that follows it.

    Attributes:
        prompt: Its tokens.
        max_new_tokens: At most.
        sampling: Its own.
        text: ``Continuation``.
        has_ended: Whether the text is whole.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        text: Continuation,
    ):
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.text = text
        self.has_ended = False
        self._pieces: list[str] = []

    def accept(self, token: int) -> bool:
        self._pieces.append(self.text.push(token))
        self.has_ended = self.text.ended or self.text.num_tokens == self.max_new_tokens
        if self.has_ended:
            self._pieces.append(self.text.finish())
        return self.has_ended

    def take_text(self) -> str:
        """What came since the last call."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


def text_requests(
    prompts: Sequence[Prompt],
    tokenizer: TextTokenizer | None,
    defaults: GenerationDefaults,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
) -> list[TextRequest]:
    """A request a prompt, each with a seed of its own: ``seed + index``.

    Args:
        tokenizer: Of the checkpoint, as ``defaults``.

    The other arguments are those of ``TextGenerator.generate_many``.

    Raises:
        ValueError: there are no prompts or no tokenizer, or a setting is out of its range.
        TypeError: ``prompts`` is one string, or a prompt is no text.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got a string")
    if not prompts:
        raise ValueError("prompts must have at least one prompt, got none")
    stops = [stop] if isinstance(stop, str) else list(stop)
    requests = []
    for i, prompt in enumerate(prompts):
        tokens = encode_prompt(tokenizer, prompt, chat, caller="generate_many")
        sampling = choose_sampling(
            defaults,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=(seed + i) % _NUM_SEEDS if seed >= 0 else seed,
        )
        text = Continuation(tokenizer.decode, tokens, defaults.eos_tokens, stops)
        requests.append(TextRequest(tokens, max_new_tokens, sampling, text))
    return requests


class Texts:
    """An iterator over ``(index, piece)`` of many texts, which counts as it goes.

    All pieces of one text come before those of the next, at least one each, which may be empty. The
    first that has not ended comes as it is generated; of the others what is there already.

    Attributes:
        num_prompts: Texts in all.
        num_ended: Texts that are whole.
        num_prompt_tokens: Tokens of the prompts.
        num_tokens: Tokens generated so far, end tokens included.
        first_seconds: Up to the first token of any.
        seconds: Up to the last token so far.
    """

    def __init__(
        self,
        requests: Sequence[TextRequest],
        run: Callable[[Sequence[TextRequest]], Iterator[int]],
    ):
        self.num_prompts: int = len(requests)
        self.num_ended: int = 0
        self.num_prompt_tokens: int = sum(len(request.prompt) for request in requests)
        self.num_tokens: int = 0
        self.first_seconds: float = 0.0
        self.seconds: float = 0.0
        self._requests = requests
        self._run = run
        self._pieces = self._in_order()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    def _in_order(self) -> Iterator[tuple[int, str]]:
        first = 0  # the first text that is not out
        for _ in self._tokens():
            while first < self.num_prompts:
                request = self._requests[first]
                piece = request.take_text()
                if piece or request.has_ended:
                    yield first, piece
                if not request.has_ended:
                    break
                first += 1

    def _tokens(self) -> Iterator[None]:
        start = time.perf_counter()
        for index in self._run(self._requests):
            self.seconds = time.perf_counter() - start
            if self.num_tokens == 0:
                self.first_seconds = self.seconds
            self.num_tokens += 1
            self.num_ended += self._requests[index].has_ended
            yield
