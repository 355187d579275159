"""What a caller asks for, by the checkpoint's own tokenizer and defaults: tokens and sampling."""

from collections.abc import Mapping, Sequence

from fastshard.checkpoint import GenerationDefaults, TextTokenizer
from fastshard.sampling import Sampling

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or a conversation: dicts with ``role`` and ``content``."""


def encode_prompt(
    tokenizer: TextTokenizer | None, prompt: Prompt, chat: bool, *, caller: str = "stream"
) -> list[int]:
    """Tokens of ``prompt``, with ``chat`` those of the chat template around it.

    Raises:
        ValueError: there is no tokenizer, or no chat template.
        TypeError: a conversation without ``chat``.
    """
    if tokenizer is None:
        raise ValueError(f"{caller} needs a tokenizer, and the checkpoint has no tokenizer.json")
    if chat:
        return tokenizer.encode_chat(prompt)
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string without chat, got {type(prompt).__name__}")
    return tokenizer.encode(prompt)


def choose_sampling(
    defaults: GenerationDefaults,
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
) -> Sampling:
    """The settings given, and the checkpoint's where None is."""
    return Sampling(
        temperature=defaults.temperature if temperature is None else temperature,
        top_k=defaults.top_k if top_k is None else top_k,
        top_p=defaults.top_p if top_p is None else top_p,
        min_p=defaults.min_p if min_p is None else min_p,
        seed=seed,
    )
