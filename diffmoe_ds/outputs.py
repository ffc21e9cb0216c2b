"""Outputs of several files that several processes may write at the same time, each with other contents.

The last process that starts wins.  Whatever a process publishes, it moves out of a directory of its own, and what it
removes, it moves into it first.  A process that starts moves the directories of all others away.  After that, they can
change nothing, even if they were suspended just before a rename: one of its two paths no longer exists.  A run
directory has a lock in addition; see `diffmoe_ds.distributed.ownership`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import TMP_PREFIX, remove_tree, sync_directory, write_error

Created = TypeVar("Created")


def write_together(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write several files, then move all of them into a directory.

    Args:
        directory: created if it does not exist.
        writers: for each file name, a function that writes the path it is given.

    Returns:
        The files, in the order of `writers`.

    Raises:
        CheckpointError: a file cannot be written, and the directory holds no new one; or another process has begun to
            write the same files.
    """
    with _claimed(own_directory(directory, "together"), directory) as own:
        for name, write in writers.items():
            write(own / name)
        _publish(own, directory, list(writers))
    return [directory / name for name in writers]


def _publish(own: Path, directory: Path, names: Sequence[str]) -> None:
    """Move files into a directory; if that fails, move those back that did not exist in it before."""
    new = [name for name in names if not os.path.lexists(directory / name)]
    try:
        for name in names:
            (own / name).replace(directory / name)
        sync_directory(directory)
    except OSError:
        for name in new:
            with contextlib.suppress(OSError):
                (directory / name).replace(own / name)
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Provide a temporary directory that gets its final name at the end of the block.

    Args:
        out: the directory; must not exist, or be empty.

    Yields:
        The temporary directory, empty.

    Raises:
        CheckpointError: something cannot be written, or another process has begun to write the same directory; nothing
            of it is left.
    """
    with _claimed(own_directory(out.parent, out.name), out) as own:
        tmp = own / "new"
        tmp.mkdir()
        yield tmp
        tmp.rename(out)
        sync_directory(out.parent)


def own_directory(root: Path, purpose: str) -> Path:
    """Return a new name for a directory of this process's own in another; the process creates it only once."""
    return root / f"{TMP_PREFIX}{purpose}-{uuid.uuid4().hex[:12]}"


def fence_others(own: Path) -> None:
    """Remove the directories that other processes have created for the same purpose, from `own_directory`.

    Args:
        own: this process's own directory; exists, unless another process has removed it.

    Raises:
        OSError: another directory cannot be moved away.
    """
    pattern = re.compile(f"{re.escape(own.name.rpartition('-')[0])}(-[0-9a-f]{{12}})?")
    for path in own.parent.iterdir():
        if path != own and pattern.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # one of the two is gone: it, or this process's own
                path.rename(own / path.name)
            remove_tree(own / path.name, ignore_errors=True)


def taken_over(own: Path, out: Path) -> CheckpointError | None:
    """Return the error to report if another process has taken over; None if this one's own directory still exists.

    Args:
        own: this process's own directory.
        out: what it writes, for the message.
    """
    if os.path.lexists(own) or not os.path.isdir(own.parent):
        return None
    return CheckpointError(f"{out}: another process has begun to write it; this one stops and changes nothing more.")


@contextlib.contextmanager
def _claimed(own: Path, out: Path) -> Iterator[Path]:
    """Create a process's own directory for a block, take over what it writes, and remove the directory at the end.

    Raises:
        CheckpointError: something cannot be written, or another process has taken over meanwhile.
    """
    claimed = False
    try:
        own.mkdir(parents=True)
        fence_others(own)
        claimed = True
        yield own
    except (OSError, CheckpointError) as error:
        reported = error if isinstance(error, CheckpointError) else write_error(out, error)
        raise (claimed and taken_over(own, out)) or reported from None
    finally:
        remove_tree(own, ignore_errors=True)


def make_directory(path: Path, own: Path | None) -> None:
    """Create a directory unless it exists, but not its parents.

    Args:
        path: the directory.
        own: a directory that exists as long as this process may change the parent of `path`. The new directory is
            moved out of it: a process that is suspended before the call cannot create anything later. If None or on
            another file system, the directory is created directly.

    Raises:
        OSError: it cannot be created, or `own` no longer exists.
    """
    if not path.is_dir():
        _move_out(path, own, lambda new: new.mkdir(exist_ok=True))


def make_file(path: Path, own: Path | None) -> int:
    """Create an empty file, which must not exist, and return its inode.

    Args:
        path: the file.
        own: see `make_directory`.

    Raises:
        OSError: it cannot be created, or `own` no longer exists.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return _move_out(path, own, _touch)


def _touch(path: Path) -> int:
    path.touch(exist_ok=False)
    return path.lstat().st_ino


def _move_out(path: Path, own: Path | None, create: Callable[[Path], Created]) -> Created:
    """Create something in a directory of this process's own, and move it to its path."""
    if own is None:
        return create(path)
    new = own / f"{TMP_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}"
    try:
        created = create(new)
        new.rename(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return create(path)
    finally:
        remove_tree(new, ignore_errors=True)
    return created
