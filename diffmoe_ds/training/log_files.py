"""Log files of a run.  An I/O error never ends a run: records wait in memory until they can be written."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from diffmoe_ds.control_files import parse_json, read_lines
from diffmoe_ds.files import Progress, replacing, write_error
from diffmoe_ds.outputs import make_directory, make_file

MAX_WAITING_BYTES = 64 << 20
"""Records that wait in memory; beyond that, the oldest are dropped."""
CHUNK_BYTES = 1 << 20
"""Most bytes of one write."""
LASTING = frozenset((errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EEXIST))
"""Errors that do not go away by themselves; a run does not start with them."""
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
"""Start of the name of an event file: TensorBoard reads the files of a directory in the order of their names."""
POSITIVE_BINS = tuple(1e-12 * 1.1**power for power in range(774))
"""Upper edges of TensorBoard's histogram bins, up to 1e20."""
BINS = (*(-edge for edge in reversed(POSITIVE_BINS)), 0.0, *POSITIVE_BINS)


class LogFile:
    """Append-only file of records.

    After an error, records wait in memory and every `flush` tries again; what was written of a record is removed first,
    so that the file never contains a part of one.  A file that another process removed is created again, but not its
    directory.  A file or run directory that another process put in its place is not touched: it may belong to another
    job.
    """

    def __init__(
        self, path: Path, prepare: Callable[[], int] | None = None, header: bytes = b"", owned: Path | None = None
    ) -> None:
        """Describe the file without touching it.

        Args:
            path: the file.
            prepare: creates the file, possibly with rows of an earlier attempt, and returns its inode; called until it
                succeeds once. If None, the file must not exist.
            header: the first bytes of a new file.
            owned: a directory that exists as long as this process owns the run directory; without it, no file is
                created. If None, files are always created.
        """
        self._path = path
        self._prepare = prepare
        self._header = header
        self._owned = owned
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._file: int | None = None
        self._inode: int | None = None
        self._end: int | None = None
        """Where a record begins that may have been written in part."""
        self._error: OSError | None = None

    def add(self, record: bytes) -> None:
        """Add a record, which `flush` writes."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._dropped += 1

    def flush(self) -> None:
        """Write the records that wait; warn once if that fails."""
        try:
            self.write()
        except OSError as error:
            if self._error is None:
                self._print(f"{_text(error)}; training goes on, records wait in memory until they can be written")
            self._error = error
        else:
            self._error = None
            self._report_dropped()

    def write(self) -> None:
        """Write the records that wait.

        Raises:
            OSError: they cannot be written.
        """
        try:
            file = self._open()
            while self._waiting:
                self._write_some(file)
        except OSError:
            self._close()  # a stale handle of a network file system never recovers
            raise

    def close(self) -> None:
        """Write what waits, warning of what is lost, and close the file."""
        if self._waiting or self._end is not None:
            self.flush()
        self._dropped += len(self._waiting)
        self._waiting.clear()
        self._report_dropped()
        self._close()

    def _open(self) -> int:
        """Return the descriptor of the file, after checking that it is still at its path."""
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            found = None
        if self._inode is not None and found is not None and found.st_ino != self._inode:
            raise OSError(errno.EEXIST, "another file was put in its place")
        if self._inode is None or found is None:
            require_owned(self._owned)
        if self._inode is not None and found is None:
            self._print("was removed by another process; later records go to a new file")
            self._close()
            self._inode = self._end = None
        if self._file is not None:
            return self._file
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if self._inode is None:
            if self._prepare is None:
                self._inode = make_file(self._path, self._owned)
            else:
                self._inode = self._prepare()
                self._prepare = None
        self._file = os.open(self._path, flags)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if self._inode not in (None, status.st_ino):  # since it was prepared
            raise OSError(errno.EEXIST, "another file was put in its place")
        self._inode = status.st_ino
        return self._file

    def _write_some(self, file: int) -> None:
        """Write records of up to `CHUNK_BYTES`, at least one, and forget them."""
        end = os.fstat(file).st_size
        if self._end is not None and self._end < end:
            os.ftruncate(file, self._end)
            end = self._end
        data = bytearray(b"" if end else self._header)
        count = 0
        for record in self._waiting:
            if count and len(data) + len(record) > CHUNK_BYTES:
                break
            data += record
            count += 1
        self._end = end
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = None
        for _ in range(count):
            self._waiting_bytes -= len(self._waiting.popleft())

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                os.close(file)
            except OSError as error:  # a network file system reports the failure of an earlier write
                self._print(_text(error))

    def _report_dropped(self) -> None:
        if self._dropped:
            self._print(f"{self._dropped:,} record(s) were not written")
            self._dropped = 0

    def _print(self, text: str) -> None:
        print(f"*** WARNING: {self._path}: {text} ***", file=sys.stderr, flush=True)


class JsonlLog:
    """``metrics.jsonl``: one strict JSON object per line."""

    def __init__(
        self, path: Path, step: int, tmp_directory: Path | None = None, progress: Progress = lambda: None
    ) -> None:  # fmt: skip
        """Open the file, dropping rows of an earlier attempt after ``step``, so that no step appears twice.

        Args:
            path: the file; created if it does not exist. It is replaced, not changed: a suspended earlier job may still
                have it open.
            step: the last step to keep.
            tmp_directory: see `replacing`.
            progress: called for every row that is kept.

        Raises:
            CheckpointError: the file cannot be written, and the error is one of `LASTING`.
        """
        self._file = LogFile(path, lambda: _keep_until(path, step, tmp_directory, progress), owned=tmp_directory)
        try:
            self._file.write()
        except OSError as error:
            if error.errno in LASTING:
                raise write_error(path, error) from None
            self._file.flush()  # warns, or succeeds by now

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._file.add(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """Event file of TensorBoard, which it reads after those of earlier attempts, whatever the clocks say."""

    def __init__(self, directory: Path, images: int, owned: Path | None = None) -> None:
        """Start an event file; TensorBoard hides an earlier attempt's events after ``images``.

        Args:
            directory: created if it does not exist.
            images: images seen so far.
            owned: see `LogFile`.
        """
        self._directory, self._owned = directory, owned
        self._wall_time, self._measured = _time_after_others(directory), time.monotonic()
        name = f"events.out.tfevents.{int(self._wall_time):010d}.{socket.gethostname()}.{os.getpid()}.0"
        header = self._record(file_version="brain.Event:2")
        header += self._record(step=images + 1, session_log=SessionLog(status=SessionLog.START))
        self._file = LogFile(directory / name, header=header, owned=owned)
        with contextlib.suppress(OSError):
            directory.parent.mkdir(parents=True, exist_ok=True)
        self.flush()  # warns at the start of the run if the directory cannot be written

    def add_scalar(self, tag: str, value: float, images: int) -> None:
        """Add a scalar at an image count."""
        self._add(summary.scalar(tag, value), images)

    def add_histogram(self, tag: str, values: Tensor, images: int) -> None:
        """Add a histogram at an image count."""
        self._add(summary.histogram(tag, values, BINS), images)

    def add_text(self, tag: str, text: str, images: int) -> None:
        """Add text at an image count."""
        self._add(summary.text(tag, text), images)

    def add_image(self, tag: str, grid_HWC: Any, images: int) -> None:
        """Add a uint8 image at an image count."""
        self._add(summary.image(tag, grid_HWC, dataformats="HWC"), images)

    def flush(self) -> None:
        """Write what was added."""
        with contextlib.suppress(OSError):  # reported when the file is opened
            require_owned(self._owned)
            make_directory(self._directory, self._owned)  # not its parents: a removed run directory stays removed
        self._file.flush()

    def close(self) -> None:
        """Write what was added and close the file."""
        self.flush()
        self._file.close()

    def _add(self, values: Any, images: int) -> None:
        self._file.add(self._record(summary=values, step=images))

    def _record(self, **fields: Any) -> bytes:
        """Return an event as TensorBoard's files contain it.  Times advance even if the clock is set back."""
        now = time.monotonic()
        self._wall_time = max(time.time(), self._wall_time + now - self._measured)
        self._measured = now
        data = io.BytesIO()
        RecordWriter(data).write(Event(wall_time=self._wall_time, **fields).SerializeToString())
        return data.getvalue()


def require_owned(owned: Path | None) -> None:
    """Verify that this process still owns the run directory, before it creates anything in it.

    Args:
        owned: see `LogFile`.

    Raises:
        OSError: the run directory was removed or replaced, or another job has taken it over.
    """
    try:
        if owned is not None:
            owned.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise OSError(errno.ENOENT, "the run directory was removed, replaced or taken over by another job") from None


def _time_after_others(directory: Path) -> float:
    """Return the present, or if it is later, the first second after the event files of a directory."""
    latest = time.time()
    with contextlib.suppress(OSError):  # usually, the directory does not exist yet
        for path in directory.iterdir():
            if match := EVENT_FILE.match(path.name):
                latest = max(latest, int(match[1]) + 1, math.ceil(path.stat().st_mtime))
    return latest


def _keep_until(path: Path, step: int, tmp_directory: Path | None, progress: Progress) -> int:
    """Replace a JSONL file by its rows up to a step; create an empty one if it does not exist.

    Returns:
        The inode of the new file.

    Raises:
        OSError: it cannot be read or written.
    """
    with replacing(path, tmp_directory) as tmp, open(tmp, "xb") as file:
        for line in _lines_until(path, step):
            file.write(line)
            progress()
        file.flush()
        os.fsync(file.fileno())
        inode = os.fstat(file.fileno()).st_ino
    return inode


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError):
        for line in read_lines(path):
            try:
                if parse_json(line)["step"] <= step:
                    yield line.encode() + b"\n"
            except (ValueError, KeyError, TypeError):
                continue  # a line that a killed run left incomplete


def _text(error: OSError) -> str:
    return f"cannot be written: {error.strerror or error}"
