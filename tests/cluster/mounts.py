"""Host directories over which each cluster mounts its own; several clusters may run at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

MADE = Path(tempfile.gettempdir()) / "diffmoe-cluster-mount-points"
"""Lists the directories that had to be created; every running cluster holds a shared lock on this file."""


def make_mount_points(paths: tuple[str, ...]) -> IO[str]:
    """Create the directories that do not exist, and return the lock that protects them."""
    lock = MADE.open("a+")
    fcntl.flock(lock, fcntl.LOCK_SH)
    for path in paths:
        with contextlib.suppress(FileExistsError):
            os.makedirs(path)
            print(path, file=lock, flush=True)
    return lock


def remove_mount_points(lock: IO[str]) -> None:
    """Release the lock; remove the created directories if no other cluster is running: this would unmount its own."""
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        lock.seek(0)
        for path in lock.read().split():
            os.rmdir(path)
        lock.truncate(0)
