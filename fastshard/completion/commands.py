"""What a parser's commands take, as completion needs it."""

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_FILES = re.compile(r"FILE|DIR|\.json")


@dataclass(frozen=True)
class Argument:
    """An option or a positional argument.

    Attributes:
        names: Of an option, like ``("-h", "--help")``; of a positional none.
        help: One line.
        metavar: Name of the value.
        num_values: 0, 1, or 2 for any number.
        words: What the value may be.
        is_file: Whether it names a file or a directory.
    """

    names: tuple[str, ...]
    help: str
    metavar: str
    num_values: int
    words: tuple[str, ...]
    is_file: bool


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: One word or two.
        help: One line.
        arguments: In the order of the parser.
        wraps: Whether another command follows behind ``--``.
    """

    name: str
    help: str
    arguments: tuple[Argument, ...]
    wraps: bool = False

    @property
    def options(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.names]

    @property
    def positionals(self) -> list[Argument]:
        return [argument for argument in self.arguments if not argument.names]


def read_commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The commands that are subparsers of ``parser``; one that wraps has an attribute ``wraps``."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                wraps = getattr(child, "wraps", False)
                yield Command(name, helps.get(name, ""), tuple(read_arguments(child)), wraps)


def read_arguments(parser: argparse.ArgumentParser) -> Iterator[Argument]:
    """The arguments of ``parser`` itself.

    A value completes to the ``choices`` of the argument or of its ``type``, to files where its
    metavar names a FILE, a DIR or a .json, else to nothing.
    """
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        choices = action.choices or getattr(action.type, "choices", ())
        metavar = action.metavar or action.dest.upper()
        help_ = formatter._expand_help(action) if action.help else ""
        num_values = {None: 1, 0: 0, "?": 1}.get(action.nargs, 2)
        yield Argument(
            names=tuple(action.option_strings),
            help=" ".join(help_.split()),
            metavar=metavar,
            num_values=num_values,
            words=tuple(map(str, choices)),
            is_file=not choices and num_values > 0 and bool(_FILES.search(metavar)),
        )


def one_word(commands: Sequence[Command]) -> list[Command]:
    """Those whose name is one word."""
    return [command for command in commands if " " not in command.name]


def second_words(commands: Sequence[Command]) -> dict[str, list[str]]:
    """First word -> the words that may follow it in the name of a command."""
    second: dict[str, list[str]] = {}
    for command in commands:
        if " " in command.name:
            first, word = command.name.split(" ")
            second.setdefault(first, []).append(word)
    return second


def two_words_pattern(commands: Sequence[Command]) -> str:
    """Pattern of ``case`` in bash and zsh: the names of two words."""
    return _pattern(command.name for command in commands if " " in command.name)


def wrapping_pattern(commands: Sequence[Command]) -> str:
    """Pattern of ``case`` in bash and zsh: the commands that wrap another."""
    return _pattern(command.name for command in commands if command.wraps)


def _pattern(names: Iterable[str]) -> str:
    return "|".join(map(shlex.quote, names)) or "''"
