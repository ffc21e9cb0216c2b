"""Checksums of files that all processes of a host read: one process hashes a file, the others trust it for an hour.

A record in the user's cache folder says which file was verified and when.  It identifies the file by device, inode,
size and times of change, so a file that has changed is hashed again, and it expires, so damage on the disk that changes
none of these is found as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from diffmoe_ds.data.sources.cache import DEFAULT_FOLDER
from diffmoe_ds.files import sha256_of

VALID_S = 3600.0
"""Seconds for which a record counts: long enough for the commands and ranks of a job to start."""
SMALLEST = 1 << 20
"""Bytes from which a file has a record; hashing a smaller one takes about as long as looking for it."""
SETTLED_S = 2.0
"""A file that changed more recently has no record: another change might get the same time."""
SLOWEST_DISK = 50e6
"""Bytes per second at which the process with the lock should hash; if it is slower, it may be suspended."""


def has_sha256(path: Path, expected: str, *, rehash: bool = False) -> bool:
    """Return whether a file has a checksum, from a record of this host or, if there is none, by hashing it.

    Args:
        path: the file.
        expected: its hexadecimal SHA-256.
        rehash: hash the file in any case.

    Raises:
        OSError: the file cannot be read.
    """
    status, boot = os.stat(path), _boot_id()
    if rehash or status.st_size < SMALLEST or boot is None:
        return sha256_of(path) == expected
    with _record(path, wait_s=30 + status.st_size / SLOWEST_DISK) as record:
        line = f"{boot} {_identity(status)} {expected}"
        if record is not None and _is_recent(record, line):
            return True
        fits = sha256_of(path) == expected
        if record is not None and fits and time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S:
            with contextlib.suppress(OSError):  # a full disk, for example; half a record is not valid
                os.ftruncate(record, 0)
                os.pwrite(record, f"{line} {time.monotonic()}".encode(), 0)
    return fits


@contextlib.contextmanager
def _record(path: Path, wait_s: float) -> Iterator[int | None]:
    """Open and lock the record of a file.

    Args:
        path: the file.
        wait_s: seconds to wait for the lock.  Without it, processes may hash the same file, which is slow but correct.

    Yields:
        A file descriptor; None if there can be no record, in a read-only home for example.
    """
    name = hashlib.sha256(f"{socket.gethostname()}\0{path.resolve()}".encode("utf-8", "surrogateescape")).hexdigest()
    try:
        folder = DEFAULT_FOLDER.expanduser() / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        record = os.open(folder / name[:32], os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except (OSError, RuntimeError):  # also a user without a home
        yield None
        return
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(record) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield record
    finally:
        os.close(record)


def _try_lock(descriptor: int) -> bool:
    """Try to lock a file, and return False if another process has locked it; not every file system has locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _boot_id() -> str | None:
    """Return what changes when the host, and with it its monotonic clock, restarts; None if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _identity(status: os.stat_result) -> str:
    """Return what changes whenever a file changes."""
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _is_recent(record: int, line: str) -> bool:
    """Return whether a record consists of a line and a time of the last `VALID_S`."""
    with contextlib.suppress(OSError, ValueError):
        found, _, written = os.pread(record, 1000, 0).decode("ascii").rpartition(" ")
        return found == line and 0 <= time.monotonic() - float(written) <= VALID_S
    return False
