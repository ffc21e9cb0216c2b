"""Run lock: one job at a time in a run directory, on any file system that several hosts share.

The lock is a small file whose modification time its holder renews every few seconds. It only requires that linking
and renaming a file are atomic (NFS, Lustre, ...), not a lock daemon or synchronized clocks. A holder that was killed or
whose host lost power stops renewing it, and the next job reclaims the stale lock: at once if the holder is known to be
gone, otherwise after the file has not changed for a while. A holder that was only suspended cannot change the run
directory any more (see `ownership`); when it resumes, it finds another job's token in the file, and exits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmoe_ds.control_files import open_regular, parse_json
from diffmoe_ds.distributed.ownership import LEFTOVERS, OWNERS, Owner
from diffmoe_ds.errors import CheckpointError, RunDirectoryBusyError
from diffmoe_ds.files import Progress, write_synced

LOCK_FILE = "lock.json"
MAX_LOCK_BYTES = 1 << 16
"""Longest lock file that is read."""
BEAT_S = 4.0
"""Seconds between two heartbeats of the holder."""
STALE_S = 24.0
"""Seconds without a heartbeat after which the lock of a holder on another host is stale."""
SETTLE_S = 1.0
"""Seconds to wait after a takeover for a concurrent one to show."""
NO_LOCK = frozenset((errno.ENOENT, errno.EINVAL, errno.ENXIO, errno.EISDIR, errno.ELOOP))
"""Errors of reading a lock file that does not exist, or of something else in its place."""


class RunLock:
    """Context manager that locks a run directory; rank 0 only."""

    def __init__(
        self,
        directory: Path,
        checkpoints: Path,
        environ: Mapping[str, str] | None = None,
        progress: Progress = lambda: None,
    ) -> None:
        """Prepare the lock without acquiring it.

        Args:
            directory: the run directory.
            checkpoints: the directory of its checkpoints, which may be on another file system.
            environ: environment with Slurm's variables; ``os.environ`` if None.
            progress: called while the lock is acquired, whenever the file system has answered.
        """
        env = os.environ if environ is None else environ
        self.owner = Owner(secrets.token_hex(8))
        self._directory, self._checkpoints = directory, checkpoints
        self._path = directory / LOCK_FILE
        self._mine = self.owner.directory(directory) / LOCK_FILE  # a second link to our file, wherever the first is
        self._file = -1
        self._acquired = False
        self._progress = progress
        self._me: dict[str, Any] = {
            "token": self.owner.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "job": env.get("SLURM_JOB_ID"),
            "restarts": _restarts(env.get("SLURM_RESTART_COUNT", "")),
            "beat": 0,  # version 0.1.0 counts here
        }
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="run-lock")
        self._lost_to: dict[str, Any] | None = None

    def __enter__(self) -> RunLock:
        """Acquire the lock, and remove what earlier holders left behind.

        Raises:
            RunDirectoryBusyError: a running job holds it.
            CheckpointError: the directory cannot be written.
        """
        try:
            self._acquire()
        except OSError as error:
            was_moved = error.errno in (errno.ENOENT, errno.ESTALE) and not os.path.exists(self._mine.parent)
            if was_moved and os.path.isdir(self._directory):  # by whoever has the lock now
                raise self._just_locked() from None
            of_checkpoints = str(error.filename).startswith(str(self._checkpoints))
            path = self._checkpoints if of_checkpoints else self._path
            reason = error.strerror
            if error.errno == errno.EEXIST and os.path.islink(path):
                reason = "the target of the link does not exist"
            raise CheckpointError(f"{path}: cannot be written on {self._me['host']}: {reason}.") from None
        finally:
            if not self._acquired:
                self._release()
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, if it is still ours."""
        self._stop.set()
        self._beating.join(timeout=BEAT_S)
        if (_read(self._path) or {}).get("token") == self._me["token"]:
            with contextlib.suppress(OSError):  # it has just been taken over, and our directory moved away
                self._path.rename(self._mine.with_suffix(".released"))
        self._release()

    def check(self) -> None:
        """Verify that the lock was still ours at the last heartbeat.

        Raises:
            RunDirectoryBusyError: another job has taken it over: this process was suspended, or its job requeued.
        """
        if self._lost_to is not None:
            how = f"was taken over by {_who(self._lost_to)}: this process had not responded, or its job was requeued"
            if not self._lost_to:
                how = "was moved or replaced, or another job has used it, while this run was using it"
            raise RunDirectoryBusyError(f"{self._directory}: {how}; it exits without writing anything.")

    def check_now(self) -> None:
        """Read the lock and verify that it is still ours.

        Raises:
            RunDirectoryBusyError: another job has taken it over, like `check`.
        """
        holder = _read(self._path)
        if holder is not None and holder["token"] != self._me["token"]:
            self._lost_to = holder
        elif self._is_fenced() and os.path.exists(self._directory):  # taken over and released since, or replaced
            self._lost_to = {}
        self.check()

    def _acquire(self) -> None:
        for root in (self._directory, self._checkpoints):
            self.owner.claim(root)  # first: whoever takes the lock after us moves these away
        write_synced(self._mine, json.dumps(self._me).encode())
        self._file = os.open(self._mine, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.link(self._mine, self._path)
        except FileExistsError:
            self._take_over()
        self._require_ours()
        # in the run directory, other leftovers may be those of a running export
        self.owner.fence_others(self._directory, OWNERS, self._progress)
        self.owner.fence_others(self._checkpoints, LEFTOVERS, self._progress)
        self._require_ours()
        self._acquired = True

    def _take_over(self) -> None:
        holder = _holder(self._path)
        if holder is not None and not self._is_gone(holder):
            print(
                f"{'waiting':>11}  up to {STALE_S:g} s to see whether {_who(holder)} is still active in "
                f"{self._directory}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            deadline = time.monotonic() + STALE_S
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 4)
                now = _holder(self._path)
                self._progress()
                if now is None:  # released meanwhile
                    break
                if _signs_of_life(now) != _signs_of_life(holder):
                    raise RunDirectoryBusyError(
                        f"{self._directory}: is in use by {_who(now)}; wait for it, cancel it, or give another "
                        "--run-dir."
                    )
        taking = self._mine.with_suffix(".taking")
        os.link(self._mine, taking)
        taking.rename(self._path)  # fails if another job has taken the lock meanwhile and moved our directory away
        time.sleep(SETTLE_S)

    def _require_ours(self) -> None:
        """Raise if another job has taken the lock, or if it cannot be read."""
        holder = self._restore()
        if holder is None or holder["token"] != self._me["token"] or self._is_fenced():
            raise self._just_locked()

    def _restore(self) -> dict[str, Any] | None:
        """Return the contents of the lock file, after putting ours back if somebody has removed it.

        A holder that resumes before its directory is moved away may release a lock that has just been taken from it.

        Raises:
            OSError: it cannot be read, or our directory was moved away.
        """
        with contextlib.suppress(FileNotFoundError):
            return _load(self._path)
        with contextlib.suppress(FileExistsError):
            os.link(self._mine, self._path)
        return _load(self._path)

    def _just_locked(self) -> RunDirectoryBusyError:
        holder, mine = _read(self._path) or {}, self._me["token"]
        who = _who(holder) if holder.get("token", mine) != mine else "another job"  # which has left since
        return RunDirectoryBusyError(f"{self._directory}: was just locked by {who}.")

    def _is_fenced(self) -> bool:
        """Return whether another job, which has the lock now, has moved our directory away."""
        try:
            os.stat(self._mine)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a disk that does not respond says nothing about the lock
            pass
        return False

    def _release(self) -> None:
        """Remove our directories, and that of the checkpoints if it is empty."""
        if self._file >= 0:  # first: NFS keeps what is open, and with it our directory
            os.close(self._file)
            self._file = -1
        for root in (self._directory, self._checkpoints):
            self.owner.release(root)
        with contextlib.suppress(OSError):
            self._checkpoints.rmdir()

    def _is_gone(self, holder: Mapping[str, Any]) -> bool:
        """Return whether the holder is known to be gone."""
        if holder["job"] is not None and holder["job"] == self._me["job"] and holder["restarts"] < self._me["restarts"]:
            return True  # Slurm restarts a job only after ending it
        here = self._me["process"]
        if holder["host"] != self._me["host"] or holder["process"].get("boot") != here["boot"]:
            return False
        if (
            holder["process"].get("namespace") != here["namespace"]
        ):  # another container: its process ids mean nothing here
            return False
        return bool(_process(holder["pid"]) != holder["process"])

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that does not respond now may do so later
                holder = self._restore()
                if holder is not None and holder["token"] != self._me["token"]:
                    self._lost_to = holder
                    return
                os.utime(self._file)  # needs no space, and never touches the file of a new holder


def _read(path: Path) -> dict[str, Any] | None:
    """Return the contents of the lock file, like `_load`; None if it cannot be read."""
    try:
        return _load(path)
    except OSError:
        return None


def _holder(path: Path) -> dict[str, Any] | None:
    """Return the contents of the lock file, like `_load`; None if there is none.

    Raises:
        OSError: it cannot be read, so that a running job may hold it.
    """
    try:
        return _load(path)
    except OSError as error:
        if error.errno in NO_LOCK:
            return None
        raise


def _load(path: Path) -> dict[str, Any] | None:
    """Return the contents of the lock file, with all keys; None if it is invalid.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        modified_ns = os.fstat(file.fileno()).st_mtime_ns
        data = file.read(MAX_LOCK_BYTES)
    try:
        found = parse_json(data.decode())
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("token"), str):
        return None
    process = found.get("process")
    known = {
        "process": process if isinstance(process, dict) else {},
        "restarts": found["restarts"] if type(found.get("restarts")) is int else 0,
        "pid": found["pid"] if type(found.get("pid")) is int else 0,
        "modified": modified_ns,
    }
    return {"host": None, "job": None, "since": None, "beat": 0, **found, **known}


def _signs_of_life(holder: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fields that an active holder changes. File times come from one server: clock skew is harmless."""
    return holder["token"], holder["beat"], holder["modified"]


def _process(pid: int) -> dict[str, Any]:
    """Return what distinguishes a process from a later one with the same id."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may contain anything
    return {
        "started": fields[19] if fields else None,  # field 22: clock ticks after boot
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _text("/proc/self/ns/pid"),
    }


def _text(path: str) -> str:
    try:
        return os.readlink(path) if os.path.islink(path) else Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _restarts(text: str) -> int:
    """Return Slurm's count of restarts; 0 if it is none, which costs no more than the wait for a stale lock."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _who(holder: Mapping[str, Any]) -> str:
    job = f"job {_shown(holder['job'])}, " if holder.get("job") else ""
    pid, host, since = (_shown(holder.get(key)) for key in ("pid", "host", "since"))
    return f"{job}process {pid} on {host} (since {since})"


def _shown(value: object) -> str:
    """Return a value from the lock file, which anybody may have written, as part of a one-line message."""
    text = str(value)[:80]
    return text if value is not None and text.isprintable() else "unknown"
