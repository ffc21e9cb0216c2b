"""Which checkpoints are kept."""

from __future__ import annotations

import itertools
from pathlib import Path

from diffmoe_ds.checkpoint.layout import LEFT, checkpoint_images
from diffmoe_ds.checkpoint.verify import check_sizes
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import remove_tree, rename_for_removal


def leave_newer(root: Path, images: int) -> list[str]:
    """Set aside, under another name, the checkpoints that a run passed over when it continued an older one.

    Otherwise the next resume or retention would take them for the newest of this run.

    Args:
        root: the run's checkpoints.
        images: of the checkpoint just completed; those of more images were made before it.

    Returns:
        Their names now.
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
        newest: name of the one that was just completed, which is never removed.
        config: how many are kept.

    Returns:
        The names of those removed.
    """
    names = sorted((p.name for p in root.iterdir() if checkpoint_images(p.name) is not None), reverse=True)
    removed = []
    for name in surplus(names, newest, config, lambda name: _is_whole(root / name)):
        remove_tree(rename_for_removal(root / name), ignore_errors=True)
        removed.append(name)
    return removed


def surplus(names: list[str], newest: str, config: CheckpointConfig, is_whole) -> list[str]:
    """Names that are not kept: neither ``newest``, nor among the N newest whole ones, nor permanent.

    A checkpoint is permanent if a multiple of ``keep_every_images`` lies between it and the checkpoint before it.
    One that is damaged takes no place among the N, so damage never costs a whole one.

    Args:
        names: of all checkpoints, the newest first.
        newest: the one just completed.
        config: how many are kept.
        is_whole: whether the checkpoint of a name passes its check.
    """
    if config.keep_last == 0:
        return []
    period = config.keep_every_images
    images = [checkpoint_images(name) for name in names] + [0]
    kept = {newest}
    for name in names:
        if len(kept) < config.keep_last and is_whole(name):
            kept.add(name)
    for index, name in enumerate(names):
        if period and images[index] // period > images[index + 1] // period:
            kept.add(name)
    return [name for name in names if name not in kept]


def _free(path: Path) -> Path:
    """The path, or if it is taken the first of ``path-2``, ``path-3``, ... that is not."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def _is_whole(path: Path) -> bool:
    try:
        check_sizes(path)
    except CheckpointError:
        return False
    return True
