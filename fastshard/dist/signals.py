"""Signals that a thread sees at once, while the main thread is inside a call that takes long."""

import _thread
import os
import select
import signal
import threading

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """SIGINT and SIGTERM for whoever waits here, instead of Python's own reaction to them.

    Python runs a handler only between two bytecodes of the main thread; the numbers of signals are
    written to a pipe at once.

    Attributes:
        seen: Signals that came so far.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._interrupts = self._is_protected = False
        self._handlers: dict[int, object] = {}
        self._old_fd = -1

    def catch(self) -> None:
        """Begin; signals that the process ignores stay ignored. Does nothing in other threads."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _CAUGHT:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """End, and let signals do what they did before."""
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def wait(self, seconds: float) -> None:
        """Until a signal comes, ``wake`` is called or the time is over."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        if ready:
            self.seen.update(number for number in os.read(self._read, 64) if number)

    def wake(self) -> None:
        """Let ``wait`` return."""
        os.write(self._write, b"\0")

    def interrupt_main(self) -> None:
        """Raise ``KeyboardInterrupt`` in the main thread, once it runs Python."""
        if signal.SIGINT in self._handlers and not self._is_protected:
            self._interrupts = True
            _thread.interrupt_main()

    def protect_main(self) -> None:
        """From here on nothing is raised in the main thread."""
        self._is_protected = True

    def _handle(self, number: int, frame: object) -> None:
        if self._interrupts and not self._is_protected:
            raise KeyboardInterrupt
