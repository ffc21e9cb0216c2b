"""What the main thread is doing, for the watchdog's thread."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

WAITING_IN = ("torch/distributed/distributed_c10d.py", "diffmoe_ds/distributed/store.py")
"""Ends of the names of the files whose functions wait for other ranks."""


def waits_for_others() -> bool:
    """Return whether the main thread is inside a collective, or waits for rank 0's store."""
    frame = _innermost()
    while frame is not None and not frame.f_code.co_filename.endswith(WAITING_IN):
        frame = frame.f_back
    return frame is not None


def stack() -> str:
    """Return the main thread's stack as text."""
    return "".join(traceback.format_stack(_innermost()))


def _innermost() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
