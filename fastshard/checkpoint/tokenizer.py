"""Text to tokens and back: tokenizer.json, and the chat template that came with it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from fastshard.checkpoint.errors import CheckpointError
from fastshard.checkpoint.json_files import read_json
from fastshard.checkpoint.source import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        special_tokens: Names of ``tokenizer_config.json`` (``bos_token`` ...) -> their text.
        chat_template: Jinja source, or None where the checkpoint has none.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self._tokenizer = tokenizer
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, with the special tokens that the tokenizer adds by itself."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks.

        Args:
            messages: Dicts with ``role`` and ``content``; a string is one message of the user.

        Raises:
            ValueError: the checkpoint has no chat template, or it refuses the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.render_chat(messages)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as one text, by the chat template."""
        if self.chat_template is None:
            raise ValueError("chat needs a chat template, and the checkpoint has none")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, ensure_ascii=False, **kwargs
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=True, **self.special_tokens
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens`` without special ones; incomplete characters are U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written so."""
        return self._tokenizer.token_to_id(text)


def read_tokenizer(source: Source) -> TextTokenizer | None:
    """The checkpoint's tokenizer, or None where it has no ``tokenizer.json``.

    Raises:
        CheckpointError: one of its files is corrupt.
    """
    path = source.find("tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{path}: no tokenizer, {error}") from error
    config_path = source.find("tokenizer_config.json")
    config = read_json(config_path) if config_path else {}
    special = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    template_path = source.find("chat_template.jinja")
    return TextTokenizer(
        tokenizer,
        {key: text for key, text in special.items() if text is not None},
        template_path.read_text(encoding="utf-8") if template_path else _template(config),
    )


def _text(token: object) -> str | None:
    """A special token as ``tokenizer_config.json`` writes it: text, or a dict with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template(config: Mapping) -> str | None:
    """``chat_template``: one template, or a list of named ones with a default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template
