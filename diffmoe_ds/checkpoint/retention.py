"""Decide which checkpoints are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from diffmoe_ds.checkpoint.layout import LEFT, checkpoint_images, checkpoint_name, checkpoint_order
from diffmoe_ds.checkpoint.verify import check_sizes
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Progress, free_name


def new_name(root: Path, images: int) -> str:
    """Return a directory name for a checkpoint that no earlier one has, not even one that was left."""
    taken = {path.name.removeprefix(LEFT) for path in root.iterdir()}
    names = (checkpoint_name(images, number) for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def leave_abandoned(root: Path, newest: str, owner: Owner) -> list[str]:
    """Rename the checkpoints that a run passed over when it continued from an older one.

    Otherwise the next resume, and retention, would take them for the newest of this run.

    Args:
        root: the run's checkpoints.
        newest: name of the checkpoint just completed; others with as many images or more belong to an abandoned branch.
        owner: of the run directory.

    Returns:
        The new names.

    Raises:
        OSError: a checkpoint cannot be renamed.
    """
    left, images = [], checkpoint_images(newest) or 0
    for path in sorted(root.iterdir()):
        if path.name != newest and (checkpoint_images(path.name) or -1) >= images:
            target = free_name(root / f"{LEFT}{path.name}")
            owner.move(path, target)
            left.append(target.name)
    return left


def remove_surplus(
    root: Path, newest: str, config: CheckpointConfig, owner: Owner, progress: Progress = lambda: None
) -> list[str]:  # fmt: skip
    """Remove the checkpoints that the configuration does not keep.

    Args:
        root: the run's checkpoints.
        newest: name of the checkpoint just completed, which is never removed.
        config: how many are kept.
        owner: of the run directory.
        progress: called after each removed file.

    Returns:
        The names of the removed checkpoints.

    Raises:
        OSError: a checkpoint cannot be removed.
    """
    names = sorted_names(path.name for path in root.iterdir())
    removed = surplus(names, newest, config, lambda name: _is_valid(root / name))
    for name in removed:
        owner.remove(root / name, progress)
    return removed


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return those that are names of checkpoints, the newest first."""
    found = [(order, name) for name in names if (order := checkpoint_order(name)) is not None]
    return [name for _, name in sorted(found, reverse=True)]


def surplus(
    names: Sequence[str], newest: str, config: CheckpointConfig, is_valid: Callable[[str], bool | None]
) -> list[str]:  # fmt: skip
    """Return the checkpoints that are neither the newest, nor among the N newest valid ones, nor permanent.

    A checkpoint is permanent if a multiple of ``keep_every_images`` lies between it and the checkpoint before it.
    A damaged checkpoint does not count among the N, so damage never costs a valid one. Neither does one that cannot be
    read now, but it is kept: it may be valid.

    Args:
        names: all checkpoints, the newest first.
        newest: the one just completed.
        config: how many are kept.
        is_valid: whether the checkpoint of a name passes verification; None if it cannot be read.
    """
    if config.keep_last == 0:
        return []
    period = config.keep_every_images
    images = [checkpoint_images(name) or 0 for name in names] + [0]
    kept, unknown = {newest}, set()
    for name in names:
        if len(kept) == config.keep_last:
            break
        valid = is_valid(name)
        if valid is None:
            unknown.add(name)
        elif valid:
            kept.add(name)
    for index, name in enumerate(names):
        if period and images[index] // period > images[index + 1] // period:
            kept.add(name)
    return [name for name in names if name not in kept | unknown]


def _is_valid(path: Path) -> bool | None:
    try:
        check_sizes(path)
    except CheckpointError as error:
        is_unknown = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
        return None if is_unknown else False
    return True
