"""The token loop: prefill, then one token a row and step, for one prompt or a padded batch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastshard.decode import WholeModel, check_mode, shards_of, start_decoding
from fastshard.sampling import Sampling

DEFAULT_NEW_TOKENS = 128
DEFAULT_PREFILL_CHUNK_SIZE = 16384
"""Tokens of a prompt: about 0.9 GB of activations in Llama 3.1 8B."""


def generate_batch(
    model: WholeModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: Sampling | None = None,
    eos_tokens: Sequence[int] = (),
    decode: str | None = None,
    prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
) -> list[list[int]]:
    """Continue several prompts at once, padded on the left to one length.

    Args:
        model: All layers, with a cache.
        prompts: Tokens of each.
        eos_tokens: A row ends after the first of these.
        decode: ``auto``, ``persistent``, ``graph`` or ``eager``, see ``fastshard.decode``; None: as
            ``FASTSHARD_DECODE`` says, else auto.
        prefill_chunk_size: At most so many tokens of a prompt at a time, for the memory that they
            take beside the cache.

    Returns:
        The new tokens of each prompt, its end token included.

    Raises:
        ValueError: no prompts, one that is empty or does not fit the context, no such mode, or a
            chunk of no tokens.
    """
    mode = check_mode(decode)
    room = check_room(model, prompts, max_new_tokens)
    check_chunk_size(prefill_chunk_size)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(rows)
    steps = token_steps(model, prompts, room, sampling or Sampling(), mode, prefill_chunk_size)
    for step in read_behind(steps):
        for i, token in enumerate(step):
            if not ended[i]:
                rows[i].append(token)
                ended[i] = token in eos_tokens
        if all(ended):
            break
    return rows


def check_room(model: WholeModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many tokens may follow the longest prompt.

    Raises:
        ValueError: as ``check_prompts``, or the model keeps no cache.
    """
    if not all(m.use_cache or m.model.caches_are_enabled() for m in shards_of(model)):
        raise ValueError("use_cache must be True for a model that generates text, got False")
    context = model.config.max_seq_len
    check_prompts(prompts, max_new_tokens, context, model.config.vocab_size)
    return min(max_new_tokens, context - max(map(len, prompts)))


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int, vocab_size: int
) -> None:
    """Raise unless each prompt may be continued within a context of so many tokens.

    Raises:
        ValueError: a prompt is empty, fills the context or holds what is no token, there is none,
            or ``max_new_tokens`` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        raise ValueError("prompts must have at least one prompt, got none")
    for prompt in prompts:
        if len(prompt) == 0:
            raise ValueError("prompt must have at least one token, got none")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt must be shorter than the context of {context} tokens, got {len(prompt)}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt must hold tokens of 0 to {vocab_size - 1}, got {min(prompt)} to "
                f"{max(prompt)}"
            )


def check_chunk_size(prefill_chunk_size: int) -> None:
    """Raise ``ValueError`` for a chunk of no tokens."""
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")


def token_steps(
    model: WholeModel,
    prompts: Sequence[Sequence[int]],
    num_steps: int,
    sampling: Sampling,
    mode: str = "auto",
    prefill_chunk_size: int = DEFAULT_PREFILL_CHUNK_SIZE,
) -> Iterator[Tensor]:
    """Prefill, then decode one token a row and step; yields ``[b]`` on the device, never waits.

    Rows are padded on the left: ``first_key`` keeps the padding out of the attention, and positions
    count from there.

    Raises:
        RuntimeError: another prompt was begun before this text ended: the cache holds that one.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    first_key = torch.tensor(padding, device=model.device) if any(padding) else None
    behind = num_steps + max(longest - prefill_chunk_size, 0)  # the first chunk
    for shard in shards_of(model):
        shard.max_generated_tokens = max(shard.max_generated_tokens, behind)
    model.running = this = object()
    graphs = getattr(model, "prompt_graphs", None)
    if graphs and len(rows) == 1 and longest <= prefill_chunk_size and graphs.holds(longest):
        logits = graphs.run(tokens)
    else:
        for start in range(0, longest, prefill_chunk_size):
            chunk = tokens[:, start : start + prefill_chunk_size]
            _, logits = model.generate(chunk, curr_pos=start, first_key=first_key, num_logits=1)
    draw = torch.zeros((), dtype=torch.int64, device=logits.device)
    chosen = sampling.choose(logits[:, -1], draw)
    yield chosen
    decoding = None
    for _ in range(num_steps - 1):
        if model.running is not this:
            raise RuntimeError("the text cannot go on: its model was given another prompt")
        if decoding is None:
            decoding = start_decoding(
                model, chosen, num_held=longest, sampling=sampling, first_key=first_key, mode=mode
            )
        yield decoding.step()


def read_behind(steps: Iterator[Tensor]) -> Iterator[list[int]]:
    """Each step's tokens on the host; on a GPU one step late, so that it never idles."""
    copies = None
    for tokens in steps:
        if tokens.device.type == "cpu":
            yield tokens.tolist()
            continue
        if copies is None:
            copies = HostCopies(tokens)
        copies.push(tokens)
        if copies.num_pending == 2:
            yield copies.pop()
    while copies is not None and copies.num_pending:
        yield copies.pop()


class HostCopies:
    """Up to two steps' tokens on their way to the host, on a stream of their own.

    A read on the stream of the steps would wait for the step after, and the GPU then for the host.

    Args:
        tokens: As those that are pushed; on a GPU.
    """

    def __init__(self, tokens: Tensor):
        self._stream = torch.cuda.Stream(tokens.device)
        self._hosts = [torch.empty_like(tokens, device="cpu", pin_memory=True) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]
        self._num_pushed = self._num_popped = 0

    @property
    def num_pending(self) -> int:
        return self._num_pushed - self._num_popped

    def push(self, tokens: Tensor) -> None:
        """Copy ``tokens`` once what has been launched so far is done."""
        index = self._num_pushed % 2
        self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._stream):
            self._hosts[index].copy_(tokens, non_blocking=True)
            self._events[index].record(self._stream)
        tokens.record_stream(self._stream)  # its memory is not reused before the copy is done
        self._num_pushed += 1

    def clear(self) -> None:
        """Let what is pending be; its copies may go on."""
        self._num_popped = self._num_pushed

    def pop(self) -> list[int]:
        """Wait for the oldest copy, and return its tokens."""
        index = self._num_popped % 2
        self._events[index].synchronize()
        self._num_popped += 1
        return self._hosts[index].tolist()
