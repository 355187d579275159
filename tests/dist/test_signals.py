"""Signals reach a waiting thread while the main thread is inside a call that Python cannot end."""

import ctypes
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastshard.dist.signals import Signals


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = Signals()
    signals.catch()
    yield signals
    signals.release()
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_seen_while_the_main_thread_is_in_c(signals, number):
    """No signal ends the main thread's wait for a mutex, and no handler runs before it does."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    seen = []

    def watch():
        os.kill(os.getpid(), number)
        signals.wait(30.0)
        seen.append(set(signals.seen))
        libc.pthread_mutex_unlock(mutex)

    thread = threading.Thread(target=watch)
    thread.start()
    libc.pthread_mutex_lock(mutex)
    thread.join()
    assert seen == [{number}]


def test_waking_is_no_signal(signals):
    signals.wake()
    signals.wait(30.0)
    assert signals.seen == set()
    signals.wait(0.0)


def test_the_main_thread_is_interrupted_on_demand_alone(signals):
    def interrupt():
        signals.interrupt_main()
        for _ in range(1000):  # Python looks for signals now and then
            pass

    os.kill(os.getpid(), signal.SIGINT)  # raises nothing
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    signals.protect_main()
    interrupt()
    os.kill(os.getpid(), signal.SIGINT)
    signals.wait(0.0)
    assert signals.seen == {signal.SIGINT}


def test_what_is_ignored_stays_ignored():
    """Like SIGINT in a shell's background job."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals = Signals()
    signals.catch()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    signals.interrupt_main()
    signals.release()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, old)


def test_another_thread_changes_nothing():
    """There Python takes no handlers."""
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with ThreadPoolExecutor() as pool:
        pool.submit(signals.catch).result()
    assert signal.getsignal(signal.SIGTERM) is before
    signals.release()
