"""Signals that ask a run to save and exit: SIGUSR1 and SIGTERM from a cluster, Ctrl-C from a person.

A signal may reach only one rank, at any time; here it is only recorded. The training loop checks at each step, and all
ranks stop together when any of them was asked to.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SAME_PRESS_S = 0.3
"""Launchers forward Ctrl-C to processes that already received it; two within this many seconds count as one."""

_received: list[signal.Signals] = []
_interrupted_at = float("-inf")


def listen() -> None:
    """Record the signals from now on instead of exiting; a second Ctrl-C exits immediately."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a process inherits the signals that its parent blocked


@contextmanager
def listening() -> Iterator[None]:
    """Listen within the context, for a process that goes on afterwards; threads other than the main one cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    listen()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def ignore() -> None:
    """Ignore the signals while the process exits, so that they do not change its exit code.

    Python removes its handlers long before the process exits, but keeps ignored signals ignored.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> str:
    """Return the name of the first signal that asked this process to stop; empty if none did."""
    return _received[0].name if _received else ""


def _note(number: int, frame: object) -> None:
    global _interrupted_at
    if number == signal.SIGINT:
        now = time.monotonic()
        if signal.SIGINT in _received and now - _interrupted_at > SAME_PRESS_S:
            os._exit(128 + number)  # exits even if the main thread is blocked
        if signal.SIGINT not in _received:
            _interrupted_at = now
            _say("\nSaving after this step, then exiting; press Ctrl-C again to exit now\n")
    _received.append(signal.Signals(number))


def _say(text: str) -> None:
    """Print from a signal handler, which may have interrupted a write to the same stream."""
    try:
        print(text, file=sys.stderr, end="", flush=True)
    except RuntimeError:  # a reentrant call
        with suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())
