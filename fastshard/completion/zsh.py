"""zsh completion."""

import re
import shlex
from collections.abc import Iterator, Sequence

from fastshard.completion.commands import (
    Argument,
    Command,
    one_word,
    second_words,
    two_words_pattern,
    wrapping_pattern,
)

_ZSH = r"""#compdef %(program)s
# zsh completion of %(program)s: in $fpath as _%(program)s, or to be sourced after compinit
_%(program)s() {
    local command
    local -i i
    local -a commands=(
%(commands)s
    )
    case $words[2] in (%(wrapping)s)
        i=${words[(i)--]}
        if ((i < CURRENT)); then
            words=("$words[1]" "${(@)words[i+1,-1]}")
            ((CURRENT -= i - 1))
        fi ;;
    esac
    if ((CURRENT == 2)); then
        _describe command commands
        _arguments %(main)s
        return
    fi
    command=$words[2]
    shift words
    ((CURRENT--))
    if ((CURRENT == 2)); then
        case $command in
%(second)s
        esac
    else
        case "$command $words[2]" in
            (%(two_words)s) command+=" $words[2]"; shift words; ((CURRENT--)) ;;
        esac
    fi
    case $command in
%(arguments)s
    esac
}
if [[ $funcstack[1] == _%(program)s ]]; then
    _%(program)s "$@"
else
    compdef _%(program)s %(program)s
fi
"""


def write(program: str, main: Command, commands: Sequence[Command]) -> str:
    """The script; arguments as in ``bash.write``."""

    def described(name: str, help_: str) -> str:
        return shlex.quote(f"{name}:{help_}")

    def specs(command: Command) -> str:
        return " ".join(
            shlex.quote(spec) for argument in command.arguments for spec in _zsh_specs(argument)
        )

    names = {command.name: command.help for command in commands}
    second = [
        f"            {first}) local -a second=("
        + " ".join(described(word, names[f"{first} {word}"]) for word in words)
        + "); _describe command second ;;"
        for first, words in second_words(commands).items()
    ]
    return _ZSH % {
        "program": program,
        "wrapping": wrapping_pattern(commands),
        "two_words": two_words_pattern(commands),
        "commands": "\n".join(f"        {described(c.name, c.help)}" for c in one_word(commands)),
        "main": specs(main),
        "second": "\n".join(second),
        "arguments": "\n".join(
            f"        ({shlex.quote(c.name)}) _arguments {specs(c)} ;;" for c in commands
        ),
    }


def _zsh_specs(argument: Argument) -> Iterator[str]:
    """Specifications of ``_arguments``, one for each name of the argument."""
    metavar = argument.metavar.replace(":", r"\:")
    action = (
        "_files" if argument.is_file else f"({' '.join(argument.words)})" * bool(argument.words)
    )
    value = f":{metavar}:{action or ' '}"
    if not argument.names:
        yield "*" * (argument.num_values > 1) + value
        return
    help_ = re.sub(r"([\[\]\\])", r"\\\1", argument.help)
    others = f"({' '.join(argument.names)})" if len(argument.names) > 1 else ""
    for name in argument.names:
        yield f"{others}{name}[{help_}]" + ["", value, f":*-*{value}"][argument.num_values]
