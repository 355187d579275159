"""The token loop: prefill, then one token a row and step, for one prompt or a padded batch."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastshard.models import ModelConfig, ShardedGeneralModel
from fastshard.sampling import Sampling

DEFAULT_NEW_TOKENS = 128


class WholeModel(Protocol):
    """A ``ShardedGeneralModel`` of all layers, or a chain of several, its ``models``."""

    config: ModelConfig
    device: torch.device

    def generate(self, tokens: Tensor, **arguments) -> tuple[None, Tensor]: ...


def generate_batch(
    model: WholeModel,
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
    room = check_room(model, prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(rows)
    for step in read_behind(token_steps(model, prompts, room, sampling or Sampling())):
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
        ValueError: a prompt is empty, fills the context or holds what is no token, there is none,
            ``max_new_tokens`` is not positive, or the model keeps no cache.
    """
    context, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if not all(m.use_cache or m.model.caches_are_enabled() for m in _shards(model)):
        raise ValueError("use_cache must be True for a model that generates text, got False")
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
    return min(max_new_tokens, context - max(map(len, prompts)))


def _shards(model: WholeModel) -> list[ShardedGeneralModel]:
    return getattr(model, "models", [model])


def token_steps(
    model: WholeModel,
    prompts: Sequence[Sequence[int]],
    num_steps: int,
    sampling: Sampling,
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
    for shard in _shards(model):
        shard.max_generated_tokens = max(shard.max_generated_tokens, num_steps)
    model.running = this = object()
    _, logits = model.generate(tokens, first_key=first_key, num_logits=1)
    step = torch.zeros((), dtype=torch.int64, device=logits.device)
    for i in range(num_steps):
        chosen = sampling.choose(logits[:, -1], step)
        yield chosen
        if i + 1 < num_steps:
            step += 1
            if model.running is not this:
                raise RuntimeError("the text cannot go on: its model was given another prompt")
            _, logits = model.generate(
                chosen[:, None].to(model.device),
                curr_pos=longest + i,
                first_key=first_key,
                num_logits=1,
            )


def read_behind(steps: Iterator[Tensor]) -> Iterator[list[int]]:
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
