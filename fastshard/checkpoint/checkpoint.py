"""Checkpoint: what a directory or hub repository says of its model, and its weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.index import WeightIndex
from fastshard.checkpoint.json_files import read_json
from fastshard.checkpoint.source import Source, open_source
from fastshard.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from fastshard.models import ModelConfig


@dataclass(frozen=True)
class GenerationDefaults:
    """What ``generation_config.json`` says, greedy where it does not ask for sampling.

    Attributes:
        eos_tokens: Any of them ends the text.
        temperature: 0 is greedy.
    """

    eos_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Checkpoint:
    """A Hugging Face directory or hub repository; each part is read when it is asked for.

    Args:
        source: Directory, or hub id ``owner/name``.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: ``config.json`` is missing or corrupt, or lacks keys; it names the file.
    """

    def __init__(self, source: str | Path):
        self.source: Source = open_source(source)
        path = self.source.find("config.json")
        if path is None:
            raise CheckpointError(f"{self.name}: config.json is missing")
        self.raw_config: dict[str, Any] = read_json(path)
        try:
            self.config: ModelConfig = ModelConfig.from_dict(self.raw_config, self.name)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def weights(self) -> WeightIndex:
        return WeightIndex(self.source)

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        return read_tokenizer(self.source)

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """From ``generation_config.json``; end tokens else from config.json or the tokenizer."""
        path = self.source.find("generation_config.json")
        raw = read_json(path) if path else {}
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = self.raw_config.get("eos_token_id")
        if eos is None and self.tokenizer:
            eos = self.tokenizer.token_id(self.tokenizer.special_tokens.get("eos_token", ""))
        if eos is None:
            eos = []
        sampling = {}
        if raw.get("do_sample"):
            names = ("temperature", "top_k", "top_p", "min_p")
            sampling = {"temperature": 1.0} | {
                name: raw[name] for name in names if raw.get(name) is not None
            }
        return GenerationDefaults(tuple(eos) if isinstance(eos, list) else (eos,), **sampling)
