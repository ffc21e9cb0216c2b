"""Atomic writes, checksums and removal of files.

A file is written under a temporary name beside its own, flushed to the disk and renamed, so a reader sees the old
contents or the new ones and never a part.  A name that begins with `TMP_PREFIX` or `REMOVING_PREFIX` was left
behind by a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.errors import CheckpointError, ConfigError

TMP_PREFIX = ".writing-"
"""Start of the name of a file or directory that is not complete yet."""
REMOVING_PREFIX = ".removing-"
"""Start of the name of a directory that is being removed."""


Progress = Callable[[], object]
"""Called whenever more bytes are read or written."""


Reading = Callable[[], contextlib.AbstractContextManager[Progress]]
"""Entered while files are read; see `diffmoe_ds.distributed.watchdog.Watchdog.reading`."""


@contextlib.contextmanager
def unwatched() -> Iterator[Progress]:
    """Watch nothing (a `Reading`)."""
    yield lambda: None


class Digest(NamedTuple):
    """Size and checksum of a file, as a manifest lists them."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal SHA-256 of the contents."""


def expand_user(path: str | Path) -> Path:
    """Return a path with a leading ``~`` or ``~USER`` replaced by the home directory.

    Raises:
        ConfigError: this host does not know the user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: this host has no home directory for the user; write the full path.") from None


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that could not be written.

    Args:
        path: the file, for system errors that name no file or the temporary one.
        error: the system's error.
    """
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else path
    if named.name.startswith((TMP_PREFIX, REMOVING_PREFIX)):
        named = path
    return CheckpointError(f"{named}: cannot be written: {error.strerror or error}.")


@contextlib.contextmanager
def replacing(path: Path, tmp_directory: Path | None = None) -> Iterator[Path]:
    """Provide a temporary path that replaces another one at the end of the block.

    Args:
        path: the file to replace or create.
        tmp_directory: directory of the temporary path, on the same file system; that of the file if None.

    Yields:
        The temporary path.  If the block raises, whatever it wrote there is removed.

    Raises:
        OSError: the file could not be written or renamed; `path` is unchanged.
    """
    tmp = (tmp_directory or path.parent) / f"{TMP_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}"
    try:
        yield tmp
        tmp.replace(path)
    finally:
        remove_tree(tmp, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: Path, tmp_directory: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that appears under its name, complete and on disk, at the end of the block.

    Args:
        path: the file to replace or create.
        tmp_directory: see `replacing`.

    Yields:
        The open file.  If the block raises, `path` keeps its old contents.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(path, tmp_directory) as tmp, open(tmp, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from None


def write_text(path: Path, text: str, tmp_directory: Path | None = None) -> Digest:
    """Write a UTF-8 file atomically and return its digest.

    Args:
        path: the file to replace or create.
        text: its contents.  Bytes of a file name that are not valid UTF-8 are written as escapes.
        tmp_directory: see `replacing`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    data = text.encode(errors="backslashreplace")
    with atomic_write(path, tmp_directory) as file:
        file.write(data)
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def write_once(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, unless another process has written it first.

    Args:
        path: the file.
        text: its contents.

    Raises:
        OSError: the file cannot be written.
    """
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        write_synced(tmp, text.encode())
        try:
            os.link(tmp, path)
        except OSError as error:
            if path.exists():
                return
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # those of a file system without links
                raise
            tmp.rename(path)
        sync_directory(path.parent)
    finally:
        remove_tree(tmp, ignore_errors=True)


def write_json(path: Path, tree: Any) -> Digest:
    """Write plain data as a JSON file, atomically, and return the file's digest.

    Raises:
        CheckpointError: the file cannot be written.
    """
    return write_text(path, json.dumps(tree, indent=1) + "\n")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file atomically; its bytes depend on its members alone.

    Args:
        path: the tar file.
        members: (name, contents) of each member; time, user and mode are constants.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(data))


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk.

    Raises:
        OSError: the file exists or cannot be written.
    """
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory to the disk, which makes renames in it durable.

    Raises:
        OSError: the directory cannot be opened or flushed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path, progress: Progress = lambda: None) -> str:
    """Return the hexadecimal SHA-256 of a file's contents.

    Args:
        path: the file.
        progress: called after every chunk.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress()
    return digest.hexdigest()


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a link or a directory with its contents, if it exists.

    Links are removed, never followed, be it `path` or a link below it, even if another process replaces a directory
    with a link meanwhile (`shutil.rmtree` opens every directory without following links).

    Args:
        path: what to remove.
        ignore_errors: remove as much as possible and raise nothing.

    Raises:
        OSError: something cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise


def free_name(path: Path) -> Path:
    """Return the path, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not os.path.lexists(name))


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left in a directory: incomplete files and half-removed directories.

    Raises:
        OSError: something cannot be removed.
    """
    for path in directory.iterdir():
        if path.name.startswith((TMP_PREFIX, REMOVING_PREFIX)):
            remove_tree(path)


def allow_open_files(needed: int) -> int:
    """Raise this process's soft limit of open files to its hard limit if it is lower than needed.

    Args:
        needed: files that the process wants to have open.

    Returns:
        The limit, which can still be lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
