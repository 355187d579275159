"""Shell completion: scripts for bash, zsh and fish, written from the parser's own arguments."""

import argparse

from fastshard.completion import bash, fish, zsh
from fastshard.completion.commands import Command, read_arguments, read_commands

SHELLS = {"bash": bash.write, "zsh": zsh.write, "fish": fish.write}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the completion script of ``parser`` for one of ``SHELLS``."""
    main = Command("", "", tuple(read_arguments(parser)))
    return SHELLS[shell](parser.prog, main, list(read_commands(parser)))
