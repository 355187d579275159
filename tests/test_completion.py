"""``fastshard completion``: each shell completes real lines by the script that it is given."""

import argparse
import contextlib
import io
import shutil
import subprocess

import pytest

from fastshard import cli, completion
from fastshard.completion import SHELLS

# A line up to the cursor -> what completes its last word. Files are those of the `files` fixture.
LINES = {
    "fastshard ar": {"archive"},
    "fastshard archive f": {"fetch"},
    "fastshard archive fetch --source res": {"result.json"},
    "fastshard archive list --op rm": {"rmsnorm"},
    "fastshard archive list --level ": {"1", "2", "3"},
    "fastshard archive show --he": {"--help"},
    "fastshard be": {"bench"},
    "fastshard bench co": {"compare"},
    "fastshard bench mlp com": set(),
    "fastshard bench mlp p": {"prefill"},
    "fastshard bench compare res": {"result.json"},
    "fastshard bench compare result.json res": {"result.json"},
    "fastshard bench compare --he": {"--help"},
    "fastshard bench plot result.json res": {"result.json"},
    "fastshard bench --js": {"--json"},
    "fastshard bench --decode gr": {"graph"},
    "fastshard bench --json res": {"result.json"},
    "fastshard generate --d": {"--decode", "--device", "--dtype"},
    "fastshard generate --dtype ": {"bfloat16", "float16", "float32"},
    "fastshard generate --decode e": {"eager"},
    "fastshard generate --chat --dtype b": {"bfloat16"},
    "fastshard generate --seed ": set(),
    "fastshard profile --so": {"--sort"},
    "fastshard profile --sort time -- gen": {"generate"},
    "fastshard profile -- generate --dt": {"--dtype"},
    "fastshard profile -- bench compare res": {"result.json"},
    "fastshard tune --strategy ev": {"evolve"},
    "fastshard completion ": set(SHELLS),
    "fastshard --vers": {"--version"},
}

BASH = r"""
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_$1
printf '%s\n' "${COMPREPLY[@]}"
"""

ZSH_INNER = r"""
PS1= PS2= RPS1=
unsetopt zle_bracketed_paste
autoload -Uz compinit; compinit -u -D
source ./script
compadd() {
    [[ "${@[1,(i)(-|--)]}" == *-(O|A|D)* ]] && { builtin compadd "$@"; return; }
    local -a hits
    builtin compadd -A hits "$@"
    local hit; for hit in $hits; do print -r -- "HIT""=$hit"; done
    builtin compadd "$@"
}
finish() { _main_complete; print -r -- "DO""NE"; exit }
zle -C finish list-choices finish
bindkey '^X' finish
"""
ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "source ./inner; print RE''ADY"
zpty -r z out '*READY*'
zpty -w -n z "$1"$'\x18'
while zpty -r z out '*'$'\n'; do
    [[ $out == *DONE* ]] && break
    [[ $out == *HIT=* ]] && print -r -- ${${out##*HIT=}%%[$'\r\n']*}
done
"""


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def script(shell: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["completion", shell]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one file to complete and each shell's script."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "result.json").write_text("{}")
    (folder / "inner").write_text(ZSH_INNER)
    for shell in SHELLS:
        (folder / shell).write_text(script(shell))
    shutil.copy(folder / "zsh", folder / "script")
    return folder


def output(folder, *command: str, stdin: str = "") -> set[str]:
    result = subprocess.run(
        command, input=stdin, cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    return {line.split("\t")[0] for line in result.stdout.splitlines()} - {""}


def bash_words(folder, words: list[str]) -> set[str]:
    return output(folder, "bash", "--norc", "-c", BASH, "bash", "./bash", *words)


def completed(folder, shell: str, line: str) -> set[str]:
    if shell == "bash":
        return bash_words(folder, line.split(" "))
    if shell == "zsh":
        return output(folder, "zsh", "-f", "-c", ZSH, "zsh", line)
    return output(folder, "fish", "--no-config", "-c", f"source ./fish; complete -C '{line}'")


def needs(shell: str):
    return pytest.param(
        shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell}")
    )


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shell", ["bash", needs("zsh"), needs("fish")])
def test_a_line_completes_to(shell, line, files):
    assert completed(files, shell, line) == LINES[line]


def test_bash_knows_whom_to_ask(files):
    shown = output(files, "bash", "--norc", "-c", "source ./bash; complete -p fastshard")
    assert shown == {"complete -F _fastshard fastshard"}


def test_bash_completes_behind_an_equals_sign(files):
    assert bash_words(files, ["fastshard", "generate", "--decode", "=", "gr"]) == {"graph"}
    assert bash_words(files, ["fastshard", "generate", "--decode", "="]) == {
        "auto",
        "persistent",
        "graph",
        "eager",
    }


def test_bash_completes_further_values(files):
    words = ["fastshard", "bench", "--decode", "graph"]
    assert bash_words(files, [*words, "e"]) == {"eager"}
    assert bash_words(files, [*words, "--v"]) == {"--vs"}
    assert bash_words(files, ["fastshard", "bench", "--dtype", "float16", "m"]) == {"mlp"}


@pytest.mark.parametrize("name", subparsers(cli.build_parser()))
def test_bash_completes_every_option_and_choice(name, files):
    parser = subparsers(cli.build_parser())[name]
    words = ["fastshard", *name.split(" ")]
    options = {option for action in parser._actions for option in action.option_strings}
    assert len(options) >= 2
    assert bash_words(files, [*words, "-"]) == options
    for action in parser._actions:
        if action.choices and action.option_strings:
            found = bash_words(files, [*words, action.option_strings[-1], ""])
            assert found == set(action.choices)


def test_bash_completes_every_command(files):
    names = {name.split(" ")[0] for name in subparsers(cli.build_parser())}
    assert bash_words(files, ["fastshard", ""]) == names


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_in_the_script(shell, files):
    text = (files / shell).read_text()
    for name, parser in subparsers(cli.build_parser()).items():
        lines = [line for line in text.splitlines() if name in line]
        for action in parser._actions:
            for option in action.option_strings:
                word = f"-l {option[2:]} " if shell == "fish" and option[:2] == "--" else option
                word = f"-s {option[1:]} " if shell == "fish" and option[:2] != "--" else word
                assert any(word in line for line in lines), f"{name} {option}"


@pytest.mark.parametrize("shell", ["bash", needs("zsh"), needs("fish")])
def test_another_parser_gets_its_own_script(shell, tmp_path):
    """No command of two words, none that wraps; words that a shell must not read as its own."""
    parser = argparse.ArgumentParser(prog="tool")
    child = parser.add_subparsers().add_parser("run", help="it's [a] 'test': 100%% $HOME `x`")
    child.add_argument("--mode", choices=["a", "b"], help="of [a], \\[b]: it's %(default)s, $(x)")
    text = completion.script(parser, shell)
    assert "fastshard" not in text
    (tmp_path / shell).write_text(text)
    (tmp_path / "script").write_text(text)
    (tmp_path / "inner").write_text(ZSH_INNER)
    assert completed(tmp_path, shell, "tool run --mode ") == {"a", "b"}
    assert completed(tmp_path, shell, "tool r") == {"run"}
    assert completed(tmp_path, shell, "tool run --m") == {"--mode"}


def test_an_unknown_shell_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "argument shell: invalid choice: 'tcsh' (choose from" in capsys.readouterr().err
