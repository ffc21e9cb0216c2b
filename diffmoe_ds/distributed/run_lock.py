"""Run lock: one job at a time in a run directory, on any file system that several hosts share.

The lock is a small file that its holder rewrites every few seconds with a higher count. It only requires that linking
and renaming a file are atomic (NFS, Lustre, ...), not a lock daemon or synchronized clocks. A holder that was killed or
whose host lost power stops counting, and the next job reclaims the stale lock: at once if the holder is known to be
gone, otherwise after the count has not changed for a while. A holder that was only suspended finds another job's token
in the file when it resumes, and exits.
"""

from __future__ import annotations

import contextlib
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

from diffmoe_ds.errors import CheckpointError, RunDirectoryBusyError
from diffmoe_ds.files import create_exclusively, replacing, write_synced

LOCK_FILE = "lock.json"
BEAT_S = 4.0
"""Seconds between two heartbeats of the holder."""
STALE_S = 24.0
"""Seconds without a heartbeat after which the lock of a holder on another host is stale."""
SETTLE_S = 1.0
"""Seconds to wait after a takeover for a concurrent one to show; heartbeats detect later ones."""


class RunLock:
    """Context manager that locks a run directory; rank 0 only."""

    def __init__(self, directory: Path, environ: Mapping[str, str] | None = None) -> None:
        """Prepare the lock without acquiring it.

        Args:
            directory: the run directory.
            environ: environment with Slurm's variables; ``os.environ`` if None.
        """
        env = os.environ if environ is None else environ
        self._path = directory / LOCK_FILE
        self._me: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "job": env.get("SLURM_JOB_ID"),
            "restarts": int(env.get("SLURM_RESTART_COUNT", 0)),
            "beat": 0,
        }
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="run-lock")
        self._lost_to: dict[str, Any] | None = None

    def __enter__(self) -> RunLock:
        """Acquire the lock.

        Raises:
            RunDirectoryBusyError: a running job holds it.
            CheckpointError: the directory cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not create_exclusively(self._path, self._contents()):
                self._take_over()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self._path}: cannot be written on {self._me['host']}: {error.strerror}."
            ) from None
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, if it is still ours."""
        self._stop.set()
        self._beating.join(timeout=BEAT_S)
        if (_read(self._path) or {}).get("token") == self._me["token"]:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Verify that the lock is still ours.

        Raises:
            RunDirectoryBusyError: another job has taken it over while this process was suspended.
        """
        if self._lost_to is not None:
            raise RunDirectoryBusyError(
                f"{self._path.parent}: was taken over by {_who(self._lost_to)} while this process was suspended; it "
                "exits without writing anything."
            )

    def _take_over(self) -> None:
        holder = _read(self._path)
        if holder is not None and not self._is_gone(holder):
            print(
                f"{'waiting':>11}  up to {STALE_S:g} s to see whether {_who(holder)} is still active in "
                f"{self._path.parent}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            deadline = time.monotonic() + STALE_S
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 4)
                now = _read(self._path)
                if now is None:  # released meanwhile
                    break
                if _signs_of_life(now) != _signs_of_life(holder):
                    raise RunDirectoryBusyError(
                        f"{self._path.parent}: is in use by {_who(now)}; wait for it, cancel it, or give another "
                        "--run-dir."
                    )
        self._write()
        time.sleep(SETTLE_S)
        holder = _read(self._path)
        if holder is None or holder["token"] != self._me["token"]:
            raise RunDirectoryBusyError(f"{self._path.parent}: was just locked by {_who(holder or {})}.")

    def _is_gone(self, holder: Mapping[str, Any]) -> bool:
        """Return whether the holder is known to be gone."""
        if holder["job"] is not None and holder["job"] == self._me["job"] and holder["restarts"] < self._me["restarts"]:
            return True  # Slurm restarts a job only after ending it
        here = self._me["process"]
        if holder["host"] != self._me["host"] or holder["process"]["boot"] != here["boot"]:
            return False
        if holder["process"]["namespace"] != here["namespace"]:  # another container: its process ids mean nothing here
            return False
        return bool(_process(holder["pid"]) != holder["process"])

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                holder = _read(self._path)
                if holder is not None and holder["token"] != self._me["token"]:
                    self._lost_to = holder
                    return
                self._me["beat"] += 1
                self._write()
            except OSError:  # a full disk: changing the modification time needs no space
                with contextlib.suppress(OSError):
                    os.utime(self._path)

    def _write(self) -> None:
        """Replace the lock's file."""
        with replacing(self._path) as tmp:
            write_synced(tmp, self._contents())

    def _contents(self) -> bytes:
        return json.dumps(self._me).encode()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the contents of the lock file; None if it is missing or invalid."""
    try:
        with path.open(encoding="utf-8") as file:
            found, modified = json.load(file), os.fstat(file.fileno()).st_mtime_ns
        return {**found, "modified": modified} if isinstance(found, dict) and "token" in found else None
    except (OSError, ValueError):
        return None


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


def _who(holder: Mapping[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
