"""Write one rank's share of a prepared set; rank 0 also waits for the others and writes the index."""

from __future__ import annotations

import contextlib
from typing import Any

from tqdm import tqdm

from diffmoe_ds.data.prepare.preparation import Preparation, check_unreadable, clean, finish, write_shard
from diffmoe_ds.data.prepare.progress import Progress
from diffmoe_ds.data.sources.index_files import PARTS
from diffmoe_ds.errors import CheckpointError, DiffMoEError
from diffmoe_ds.files import write_text
from diffmoe_ds.text import counted


def run(preparation: Preparation, rank: int, world: int, timeout: float) -> None:
    """Write this rank's shards.  Rank 0 also shows progress, writes the index and prints a summary.

    Args:
        preparation: the set, after `begin`.
        rank: this rank.
        world: number of ranks.
        timeout: seconds without a new shard after which rank 0 gives up on the other ranks.

    Raises:
        DataError: too many images are unreadable, a lost shard cannot be regenerated, or another rank failed.
        CheckpointError: a file cannot be written.
    """
    lost, report = preparation.lost(), None
    try:
        if not preparation.is_finished():
            report = _write(preparation, rank, world, timeout)
    except CheckpointError:  # another launch may have finished the set and removed what this one was writing
        if not preparation.is_finished():
            raise
    if preparation.is_finished():
        clean(preparation)
    if rank:
        return
    if report is None:
        how = f"again, {len(lost)} shard(s) regenerated" if lost else "already"
        print(f"{preparation.out} is complete {how}")
        return
    print(f"{preparation.out}: {counted(report['stored'], 'sample')} in {counted(preparation.shards, 'shard')}")
    if report.get("truncated_captions"):
        print(
            f"{report['truncated_captions']:,} of {report['captions']:,} captions have more tokens than an encoder "
            "reads; the rest of each is ignored"
        )
    if report["skipped"]:
        print(f"{counted(len(report['skipped']), 'unreadable image')}, see {preparation.out / 'report.json'}")


def _write(preparation: Preparation, rank: int, world: int, timeout: float) -> dict[str, Any] | None:
    """Write shards, and on rank 0 wait for the others; return the report of the set that rank 0 finished."""
    note = preparation.out / PARTS / f"failed-{rank:05d}"
    if rank == 0:
        for old in note.parent.glob("failed-*"):  # from an earlier launch
            old.unlink(missing_ok=True)
    with tqdm(total=len(preparation.source), unit="image", desc="prepare", disable=rank != 0) as bar:
        progress = Progress(preparation, rank, world, bar)
        unreadable: list[dict[str, str]] = []
        try:
            for shard in progress.own_shards():
                unreadable += write_shard(preparation, shard, progress.advance)
                check_unreadable(preparation, unreadable)
        except DiffMoEError as error:
            with contextlib.suppress(CheckpointError):  # on a full disk, the error to report is the first one
                write_text(note, str(error))
            raise
        if rank:
            return None
        progress.wait(timeout)
    return None if preparation.is_finished() else finish(preparation)
