"""Signals that ask a run to save and leave: SIGUSR1 and SIGTERM of a cluster, Ctrl-C of a person.

A signal reaches a process at any time, perhaps only one of many; here it is only noted.  The loop asks at each step,
and all ranks agree to stop when any of them was asked.
"""

from __future__ import annotations

import os
import signal
import sys
import time

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SAME_PRESS_S = 0.3
"""Launchers pass Ctrl-C on, within some 10 ms, to processes that have it already; two within this time are one."""

_received: list[signal.Signals] = []
_interrupted_at = float("-inf")


def listen() -> None:
    """Note the signals from now on instead of ending; a second Ctrl-C ends the process at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """The run is over, well or not, and its exit code stands: a signal on the way out does not change it.

    Python gives up its own handlers long before the process has gone, but leaves signals ignored that were.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> str:
    """Name of the first signal that asked this process to stop; empty if none did."""
    return _received[0].name if _received else ""


def _note(number: int, frame: object) -> None:
    global _interrupted_at
    if number == signal.SIGINT:
        now = time.monotonic()
        if signal.SIGINT in _received and now - _interrupted_at > SAME_PRESS_S:
            os._exit(128 + number)  # whatever the main thread waits for, it does not get in the way
        if signal.SIGINT not in _received:
            _interrupted_at = now
            print("\nsaving after this step and leaving; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
    _received.append(signal.Signals(number))
