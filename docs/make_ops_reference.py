"""Write docs/ops.md, the reference of ``fastshard.ops``, from the docstrings of the package.

    python docs/make_ops_reference.py

A test holds the page to the docstrings.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import torch

from fastshard import ops

PAGE = Path(__file__).parent / "ops.md"
HEAD = """# Ops

Written by `python docs/make_ops_reference.py` from the docstrings; do not edit.

An op checks its arguments, raises `ValueError` for shapes, devices and values and `TypeError` for
dtypes, the same on every device, and calls the raw op of `torch.ops.fastshard` whose schema is
shown. The raw ops check what memory safety needs, and raise `RuntimeError`. Each has a fake
kernel, so that it traces under `torch.compile(fullgraph=True)`, and reads nothing back from the
device, so that it can be captured in a CUDA graph. On the CPU it is a reference in plain PyTorch,
which is the specification of the kernel.
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Source")


def public() -> list[tuple[str, object]]:
    """Functions and classes of ``fastshard.ops``, family by family."""
    found = [(name, getattr(ops, name)) for name in ops.__all__]
    found = [(name, thing) for name, thing in found if isinstance(thing, (FunctionType, type))]
    return sorted(found, key=lambda pair: place(pair[1]))


def place(thing: object) -> tuple[str, int]:
    """Its family and its line; what helps a family comes after it."""
    return thing.__module__.split(".")[-1].lstrip("_"), inspect.getsourcelines(thing)[1]


def signature(name: str, thing: object) -> str:
    """As in the source; one argument a line where it is long."""
    if isinstance(thing, type):
        return f"class {name}"
    node = ast.parse(inspect.getsource(thing)).body[0]
    args = node.args
    given = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
    lines = [argument(*pair) for pair in zip(args.args, given, strict=True)]
    lines += ["*"] * bool(args.kwonlyargs)
    lines += [argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    returns = ast.unparse(node.returns)
    short = f"{name}({', '.join(lines)}) -> {returns}"
    if len(short) <= 100:
        return short
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returns}"


def argument(node: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(node) + ("" if default is None else f" = {ast.unparse(default)}")


def link(name: str) -> str:
    return f"[`{name}`](#{name.lower()})"


def markdown(text: str) -> str:
    """A docstring's inline marks as Markdown's."""
    text = re.sub(r":func:`(\w+)`", lambda match: link(match[1]), text)
    return re.sub(r"``(.+?)``", lambda match: f"`{' '.join(match[1].split())}`", text, flags=re.S)


def body(docstring: str) -> Iterator[str]:
    """Paragraphs, and each section as a list or a paragraph under its name in bold."""
    section = None
    for block in re.split(r"\n\s*\n", docstring):
        title = re.match(rf"({'|'.join(SECTIONS)}):\s*", block)
        if title is None:
            yield block if section is None else textwrap.dedent(block)
            continue
        section = title[1]
        content = block[title.end() :]
        if section in ("Args", "Attributes", "Raises"):
            content = textwrap.dedent(" " * 4 + content)
            items = re.sub(r"^(\w+): ", r"- `\1`: ", content, flags=re.M)
            yield f"**{section}**\n\n{re.sub(r'^ +', '  ', items, flags=re.M)}"
        else:
            yield f"**{section}**: {re.sub(r'^ +', '', content, flags=re.M)}"


def raw_schema(name: str) -> str | None:
    packet = getattr(torch.ops.fastshard, name, None)
    return packet and str(packet.default._schema)


def entry(name: str, thing: object) -> str:
    parts = [f"## {name}", f"```\n{signature(name, thing)}\n```"]
    parts += [markdown(part) for part in body(inspect.getdoc(thing))]
    schema = raw_schema(name)
    if schema:
        parts.append(f"**Raw op**: `{schema}`")
    return "\n\n".join(parts)


def first_line(thing: object) -> str:
    return markdown(inspect.getdoc(thing).split("\n\n")[0].replace("\n", " "))


def page() -> str:
    things = public()
    rows = [f"| {link(name)} | {first_line(thing)} |" for name, thing in things]
    table = "\n".join(["| | |", "|---|---|", *rows])
    return "\n\n".join([HEAD.strip(), table, *(entry(*pair) for pair in things)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
