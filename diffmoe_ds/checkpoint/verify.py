"""Verify checkpoints and find the newest valid one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from diffmoe_ds.checkpoint.layout import LATEST, MANIFEST, META, checkpoint_order, checkpoint_root
from diffmoe_ds.checkpoint.metadata import read_manifest
from diffmoe_ds.control_files import read_text
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Digest, Progress, sha256_of
from diffmoe_ds.text import reason

SHOWN_PROBLEMS = 5
"""Damaged checkpoints that an error describes."""

MAX_NAME_BYTES = 4096
"""Limit of ``latest``, which holds the name of a checkpoint."""


def check_sizes(path: Path) -> dict[str, Digest]:
    """Verify a checkpoint quickly: every file exists with its size, and ``meta.json`` has its checksum.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the first file that is missing, truncated or changed. If it cannot be read, the cause is
            an `OSError`.
    """
    files = read_manifest(path)
    check_file_sizes(path, files)
    check_contents(path, {META: files[META]})
    return files


def check_file_sizes(path: Path, files: Mapping[str, Digest]) -> None:
    """Verify that files of a checkpoint exist with their sizes.

    Args:
        path: the checkpoint's directory.
        files: the files, from the manifest.

    Raises:
        CheckpointError: names the first file that is missing or truncated.
    """
    for name, digest in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}.") from error
        if size != digest.size:
            raise CheckpointError(
                f"{path / name}: is damaged: it has {size} bytes, but was written with {digest.size}."
            )


def check_contents(path: Path, files: Mapping[str, Digest], progress: Progress = lambda: None) -> None:
    """Verify the checksums of files of a checkpoint.

    Args:
        path: the checkpoint's directory.
        files: the files to read, from the manifest.
        progress: called whenever more bytes are read.

    Raises:
        CheckpointError: names the first file whose contents have changed.
    """
    for name, digest in files.items():
        try:
            found = sha256_of(path / name, progress)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}.") from error
        if found != digest.sha256:
            raise CheckpointError(f"{path / name}: is damaged: its SHA-256 differs from {MANIFEST}.")


def candidates(path: Path) -> list[Path]:
    """Return the checkpoints of a path in order of preference.

    A checkpoint stands for itself.  A run directory or its ``checkpoints`` stands for the checkpoint that ``latest``
    names, followed by the others from the newest to the oldest.  Newer checkpoints that were completed after ``latest``
    was written come first: the file could not be updated then.

    Raises:
        CheckpointError: the path cannot be read.
    """
    root = path
    try:
        if (path / META).is_file() or (path / MANIFEST).is_file():
            return [path]
        for root in (checkpoint_root(path), path):
            if root.is_dir():
                found = [p for p in root.iterdir() if checkpoint_order(p.name) is not None and p.is_dir()]
                if found:
                    return sorted(found, key=_preference(root), reverse=True)
    except OSError as error:  # a name that the file system refuses, a directory without permission
        raise CheckpointError(f"{str(root)[:200]}: cannot be read: {error.strerror}.") from None
    return []


def newest_valid(path: Path, *, full: bool) -> Path | None:
    """Return the first of `candidates` that is valid, with a warning for each one that is not.

    Args:
        path: a checkpoint, a run directory or its ``checkpoints``.
        full: verify checksums, not only sizes.

    Returns:
        The checkpoint, or None without candidates.

    Raises:
        CheckpointError: there are candidates, but none is valid.
    """
    every = candidates(path)
    problems: list[CheckpointError] = []
    for candidate in every:
        try:
            files = check_sizes(candidate)
            if full:
                check_contents(candidate, files)
        except CheckpointError as error:
            problems.append(error)
            continue
        for skipped, problem in zip(every, problems, strict=False):
            warn_skipped(skipped, problem)
        return candidate
    if len(every) == 1:
        raise problems[0]
    if every:
        raise no_valid_one(path, len(every), problems)
    return None


def warn_skipped(path: Path, error: CheckpointError) -> None:
    """Print a warning that a checkpoint is not used."""
    print(f"\n*** WARNING: the checkpoint {path} is skipped. {error} ***\n", file=sys.stderr, flush=True)


def no_valid_one(path: Path, count: int, problems: Sequence[CheckpointError] = ()) -> CheckpointError:
    """Return the error for a directory with damaged checkpoints only; starting from scratch would hide the damage.

    Args:
        path: the directory.
        count: number of its checkpoints.
        problems: what is wrong with each; if empty, warnings have said it.
    """
    described = "; ".join(map(reason, problems[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        described += f"; and {len(problems) - SHOWN_PROBLEMS} more"
    return CheckpointError(
        f"{path}: none of its {count} checkpoint(s) is valid ({described or 'see the warnings'}); restore one, or give "
        "another --run-dir."
    )


def shares(files: Mapping[str, Digest], rank: int, world: int) -> dict[str, Digest]:
    """Return the files that one of several ranks verifies, so that together they verify all.

    On the layout that saved it, a rank gets its own file, which it reads afterwards.
    """
    names = sorted(files, key=lambda name: (name == META, name))
    return {name: files[name] for name in names[rank::world]}


def _preference(root: Path) -> Callable[[Path], tuple[bool, bool, tuple[int, int]]]:
    """Return a sort key that is larger for checkpoints to be preferred."""
    latest, written_ns = "", 0
    with suppress(OSError, ValueError):
        latest = read_text(root / LATEST, MAX_NAME_BYTES).strip()
        written_ns = (root / LATEST).stat().st_mtime_ns
    named = checkpoint_order(latest)

    def key(path: Path) -> tuple[bool, bool, tuple[int, int]]:
        order = checkpoint_order(path.name) or (0, 0)
        completed_later = False
        if named is not None and order > named:
            with suppress(OSError):
                completed_later = (path / MANIFEST).stat().st_mtime_ns > written_ns
        return completed_later, path.name == latest, order

    return key
