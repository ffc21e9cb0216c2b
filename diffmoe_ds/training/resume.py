"""Agreement on the checkpoint to resume from: all ranks use the same one, and every byte of it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffmoe_ds.checkpoint.layout import checkpoint_order
from diffmoe_ds.checkpoint.metadata import read_manifest
from diffmoe_ds.checkpoint.verify import check_contents, check_file_sizes, no_valid_one, shares, warn_skipped
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.collectives import broadcast, get_rank, get_world_size
from diffmoe_ds.distributed.consensus import raise_on_all_ranks, vote
from diffmoe_ds.errors import AlreadyReportedError, CheckpointError
from diffmoe_ds.files import Reading, unwatched

KEPT = {"data": ("shuffle", "shuffle_window"), "ema": ("warmup",)}
"""By section, the keys that keep their values when a run resumes, unless its recipe sets them; defaults may change."""


def continued(config: Config, saved: Config) -> Config:
    """Return the configuration of a resumed run, with the checkpoint's values for the keys in `KEPT` that are not set.

    Args:
        config: the recipe.
        saved: the configuration in the checkpoint.
    """
    sections = {}
    for name, keys in KEPT.items():
        section, old = getattr(config, name), getattr(saved, name)
        kept = {key: getattr(old, key) for key in keys if key not in section.model_fields_set}
        sections[name] = section.model_copy(update=kept)
    return config.model_copy(update=sections)


def agree_on_checkpoint(
    choices: Sequence[Path], directory: Path, device: torch.device, reading: Reading = unwatched
) -> Path | None:
    """Return the first undamaged choice. Every rank must call this.

    The files are divided between the ranks. A damaged choice is skipped with a warning that names the file, printed by
    the lowest rank that found damage.

    Args:
        choices: checkpoints in order of preference. Rank 0's list is used; the other ranks must see the same ones.
        directory: the run directory, for error messages.
        device: device for the tensors of the collectives.
        reading: entered while this rank reads, see `Watchdog.reading`.

    Returns:
        The checkpoint; None if there are no choices.

    Raises:
        CheckpointError: on all ranks, if all choices are damaged.
    """
    (count,) = _from_main((len(choices),), device)
    for number in range(count):
        path = choices[number] if number < len(choices) else None
        wanted = _from_main(_order(path), device)
        try:
            return raise_on_all_ranks(device, lambda: _verify_share(path, wanted, directory, reading))  # noqa: B023
        except AlreadyReportedError:
            continue
        except CheckpointError as error:
            warn_skipped(path or directory, error)
    if count:
        vote(device, no_valid_one(directory, count))
    return None


def _order(path: Path | None) -> tuple[int, ...]:
    """Return what orders a checkpoint among those of its run, or what no checkpoint has."""
    return (-1, -1) if path is None else checkpoint_order(path.name) or (0, 1)


def _verify_share(path: Path | None, wanted: tuple[int, ...], directory: Path, reading: Reading) -> Path:
    """Verify this rank's share of a checkpoint's files.

    Args:
        path: the checkpoint; None if this rank does not see as many checkpoints as rank 0.
        wanted: `_order` of the checkpoint that rank 0 sees.
        directory: the run directory, for error messages.
        reading: see `agree_on_checkpoint`.
    """
    rank = get_rank()
    if path is None or _order(path) != wanted:
        raise CheckpointError(
            f"{directory}: rank 0 sees a checkpoint of {wanted[0]:,} images but rank {rank} does not; the run "
            "directory must be on a shared file system."
        )
    with reading() as progress:
        files = shares(read_manifest(path), rank, get_world_size())
        check_file_sizes(path, files)
        check_contents(path, files, progress)
    return path


def _from_main(values: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """Return rank 0's values on all ranks."""
    return tuple(broadcast(torch.tensor(values, device=device)).tolist())
