"""Decide which checkpoints are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from diffmoe_ds.checkpoint.layout import LEFT, checkpoint_images
from diffmoe_ds.checkpoint.verify import check_sizes
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import remove_tree, rename_for_removal


def leave_newer(root: Path, images: int) -> list[str]:
    """Rename the checkpoints that a run passed over when it continued from an older one.

    Otherwise the next resume, and retention, would take them for the newest of this run.

    Args:
        root: the run's checkpoints.
        images: images of the checkpoint just completed; checkpoints with more belong to an abandoned branch.

    Returns:
        The new names.

    Raises:
        OSError: a checkpoint cannot be renamed.
    """
    left = []
    for path in sorted(root.iterdir()):
        if (checkpoint_images(path.name) or 0) > images:
            left.append(path.rename(_free(root / f"{LEFT}{path.name}")).name)
    return left


def remove_surplus(root: Path, newest: str, config: CheckpointConfig) -> list[str]:
    """Remove the checkpoints that the configuration does not keep.

    Args:
        root: the run's checkpoints.
        newest: name of the checkpoint just completed, which is never removed.
        config: how many are kept.

    Returns:
        The names of the removed checkpoints.

    Raises:
        OSError: a checkpoint cannot be renamed.
    """
    names = sorted((p.name for p in root.iterdir() if checkpoint_images(p.name) is not None), reverse=True)
    removed = surplus(names, newest, config, lambda name: _is_valid(root / name))
    for name in removed:
        remove_tree(rename_for_removal(root / name), ignore_errors=True)
    return removed


def surplus(
    names: Sequence[str], newest: str, config: CheckpointConfig, is_valid: Callable[[str], bool]
) -> list[str]:  # fmt: skip
    """Return the checkpoints that are neither the newest, nor among the N newest valid ones, nor permanent.

    A checkpoint is permanent if a multiple of ``keep_every_images`` lies between it and the checkpoint before it.
    A damaged checkpoint does not count among the N, so damage never costs a valid one.

    Args:
        names: all checkpoints, the newest first.
        newest: the one just completed.
        config: how many are kept.
        is_valid: whether the checkpoint of a name passes verification.
    """
    if config.keep_last == 0:
        return []
    period = config.keep_every_images
    images = [checkpoint_images(name) or 0 for name in names] + [0]
    kept = {newest}
    for name in names:
        if len(kept) < config.keep_last and is_valid(name):
            kept.add(name)
    for index, name in enumerate(names):
        if period and images[index] // period > images[index + 1] // period:
            kept.add(name)
    return [name for name in names if name not in kept]


def _free(path: Path) -> Path:
    """Return the path, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def _is_valid(path: Path) -> bool:
    try:
        check_sizes(path)
    except CheckpointError:
        return False
    return True
