"""bash completion."""

import shlex
import textwrap
from collections.abc import Sequence

from fastshard.completion.commands import (
    Argument,
    Command,
    one_word,
    second_words,
    two_words_pattern,
    wrapping_pattern,
)

_BASH = r"""# bash completion of %(program)s, to be sourced
_%(program)s() {
    local current=${COMP_WORDS[COMP_CWORD]} option='' command='' options='' words='' files=''
    local -i start=1 first i given=0 takes=0
    COMPREPLY=()
    case ${COMP_WORDS[1]} in %(wrapping)s)
        for ((i = 2; i < COMP_CWORD; i++)); do
            if [[ ${COMP_WORDS[i]} == -- ]]; then start=i+1; break; fi
        done ;;
    esac
    first=start
    if ((COMP_CWORD > start)); then command=${COMP_WORDS[start]}; first=start+1; fi
    if ((COMP_CWORD > start + 1)); then
        case "$command ${COMP_WORDS[start+1]}" in
            %(two_words)s) command+=" ${COMP_WORDS[start+1]}"; first=start+2 ;;
        esac
    fi
    for ((i = first; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -*) option=${COMP_WORDS[i]}; given=0 ;;
            =) ;;
            *) given+=1 ;;
        esac
    done
    if [[ $current == = ]]; then current=''; fi
    case $command in
%(options)s
    esac
    case "$command $option" in
%(values)s
    esac
    if ((takes == 0 || takes == 1 && given > 0)) || [[ $current == -* && given -gt 0 ]]; then
        words='' files=''
        case $command in
%(positionals)s
        esac
        if ((COMP_CWORD == first)); then
            case $command in
%(second)s
            esac
        fi
        if [[ $current == -* ]]; then words=$options files=''; fi
    fi
    if [[ $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
    else
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    fi
}
complete -F _%(program)s %(program)s
"""


def write(program: str, main: Command, commands: Sequence[Command]) -> str:
    """The script.

    Args:
        program: Name of the program.
        main: The options before a command.
        commands: All commands.
    """

    def case(pattern: str, assignments: str) -> str:
        return f"{pattern}) {assignments} ;;"

    def lines(cases: Sequence[str], indent: int) -> str:
        return textwrap.indent("\n".join(cases), " " * indent)

    def values(argument: Argument) -> str:
        return "files=1" if argument.is_file else f"words={shlex.quote(' '.join(argument.words))}"

    options, positionals, option_values = [], [], []
    for command in [main, *commands]:
        name = shlex.quote(command.name)
        names = " ".join(name for option in command.options for name in option.names)
        options.append(case(name, f"options={shlex.quote(names)}"))
        for argument in command.positionals[:1]:
            positionals.append(case(name, values(argument)))
        for option in command.options:
            if option.num_values:
                pattern = "|".join(shlex.quote(f"{command.name} {n}") for n in option.names)
                option_values.append(case(pattern, f"takes={option.num_values} {values(option)}"))
    first = " ".join(command.name for command in one_word(commands))
    positionals.append(case("''", f"words={shlex.quote(first)}"))
    second = [
        case(name, f"words+={shlex.quote(' ' + ' '.join(words))}")
        for name, words in second_words(commands).items()
    ]
    return _BASH % {
        "program": program,
        "wrapping": wrapping_pattern(commands),
        "two_words": two_words_pattern(commands),
        "options": lines(options, 8),
        "values": lines(option_values, 8),
        "positionals": lines(positionals, 12),
        "second": lines(second, 16),
    }
