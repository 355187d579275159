"""Python of a page, run as one rank."""

import contextlib
import io


def run_block(code: str) -> str:
    """What the block prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "the page", "exec"), {"__name__": "page"})
    return out.getvalue()
