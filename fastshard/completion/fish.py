"""fish completion."""

from collections.abc import Sequence

from fastshard.completion.commands import Argument, Command, one_word, second_words

_FISH = r"""# fish completion of %(program)s, to be sourced
function __%(program)s_words -d 'Words before the cursor, from the command on'
    set -l words (commandline -opc)
    set -e words[1]
    if set -q words[1]
        printf '%%s\n' $words
    end
end
function __%(program)s_wraps -d 'Whether another command follows behind --'
    set -l words (__%(program)s_words)
    contains -- "$words[1]" %(wrapping)s; and contains -- -- $words
end
function __%(program)s_wrapped -d 'What completes that command'
    set -l words (__%(program)s_words)
    set -e words[1..(contains -i -- -- $words)]
    complete -C "%(program)s $words "(commandline -ct)
end
function __%(program)s_in -d 'Whether the command is this one'
    set -l words (__%(program)s_words)
    if contains -- "$words[1] $words[2]" %(two_words)s
        test "$words[1] $words[2]" = "$argv"
    else
        test "$words[1]" = "$argv"
    end
end
function __%(program)s_at -d 'Whether these are all words so far'
    set -l words (__%(program)s_words)
    test "$words" = "$argv"
end
complete -c %(program)s -f
complete -c %(program)s -n __%(program)s_wraps -a '(__%(program)s_wrapped)'
"""


def write(program: str, main: Command, commands: Sequence[Command]) -> str:
    """The script; arguments as in ``bash.write``."""
    text = _FISH % {
        "program": program,
        "wrapping": " ".join(_quote(c.name) for c in commands if c.wraps),
        "two_words": " ".join(_quote(c.name) for c in commands if " " in c.name),
    }
    names = {command.name: command.help for command in commands}

    def line(condition: str, command: str, rest: str) -> str:
        test = _quote(f"__{program}_{condition} {_quote(command)}")
        return f"complete -c {program} -n {test} {rest}\n"

    for command in one_word(commands):
        text += line("at", "", f"-a {command.name} -d {_quote(command.help)}")
    for first, words in second_words(commands).items():
        for word in words:
            text += line("at", first, f"-a {word} -d {_quote(names[f'{first} {word}'])}")
    for command in [main, *commands]:
        for argument in command.arguments:
            if argument.names or argument.words or argument.is_file:
                text += line("in", command.name, _describe(argument))
    return text


def _describe(argument: Argument) -> str:
    """The argument's part of ``complete``."""
    parts = [
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in argument.names
    ]
    if argument.words:
        parts.append(f"-a {_quote(' '.join(argument.words))}")
    if argument.names and argument.num_values:
        parts.append("-r" if argument.is_file else "-x")
    if argument.is_file:
        parts.append("-F")
    parts.append(f"-d {_quote(argument.help)}")
    return " ".join(parts)


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
