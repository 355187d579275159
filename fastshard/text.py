"""Tokens to a stream of text: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Collection, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens decoded along, so that a decoder's treatment of the first one does not show
_MAX_HELD = 16  # tokens; a character has at most 4 bytes, more are no text at all


class Detokenizer:
    """Text of tokens that come one by one.

    A token may hold part of a character, and some decoders strip a leading space: so each token is
    decoded along with those before it, and text that ends in an incomplete one is held back.

    Args:
        decode: Text of a list of tokens.
        prompt: Tokens before the first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()):
        self._decode = decode
        self._context = list(prompt[-_CONTEXT:])  # of text that is out
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._held.append(token)
        text = self._pending()
        if text.endswith(_INCOMPLETE) and len(self._held) < _MAX_HELD:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """What is held back, incomplete characters too."""
        return self._release(self._pending()) if self._held else ""

    def _pending(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        self._context = (self._context + self._held)[-max(_CONTEXT, len(self._held)) :]
        self._held = []
        return text


class StopFilter:
    """Passes text on until the first of the stop strings, wherever its pieces are cut.

    Attributes:
        stopped: Whether one was met; it and what follows it is dropped.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise ValueError(f"stop must be non-empty strings, got {list(stops)}")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that no stop string can begin in any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that some stop string begins with
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if self._begins_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)


class Continuation:
    """The text that the tokens after a prompt make, up to an end token or a stop string.

    Args:
        decode: Text of a list of tokens.
        prompt: The tokens before.
        eos_tokens: Any of them ends the text.
        stops: The text ends before the first of these.

    Attributes:
        num_tokens: Tokens pushed, an end token included.
        ended: Whether an end token or a stop string was met.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int],
        eos_tokens: Collection[int],
        stops: Sequence[str],
    ):
        self.num_tokens: int = 0
        self.ended: bool = False
        self._eos_tokens = frozenset(eos_tokens)
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop_filter = StopFilter(stops)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self.num_tokens += 1
        if token in self._eos_tokens:
            self.ended = True
            return ""
        text = self._stop_filter.push(self._detokenizer.push(token))
        self.ended = self._stop_filter.stopped
        return text

    def finish(self) -> str:
        """What is held back, once no token follows."""
        rest = self._stop_filter.push(self._detokenizer.finish())
        return rest + self._stop_filter.finish()
