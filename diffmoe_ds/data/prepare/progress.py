"""Progress of a preparation over all ranks, as the records in its directory show it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

from tqdm import tqdm

from diffmoe_ds.control_files import MAX_TEXT_BYTES, read_text
from diffmoe_ds.data.prepare.preparation import Preparation
from diffmoe_ds.data.sources.index_files import PARTS
from diffmoe_ds.errors import CheckpointError, DataError

POLL_INTERVAL = 1.0
"""Seconds between checks of the other ranks' records."""


class Progress:
    """The shards that are still missing.  Only rank 0 watches the other ranks."""

    def __init__(self, preparation: Preparation, rank: int, world: int, bar: tqdm[Any]) -> None:
        """Read the records that exist.

        Args:
            preparation: the set.
            rank: this rank.
            world: number of ranks.
            bar: shows the images of finished shards, and of this rank's current one.
        """
        self._preparation = preparation
        self._rank = rank
        self._world = world
        self._bar = bar
        self._missing = preparation.missing()
        self._own = 0
        self._polled = self._changed = time.monotonic()
        bar.initial = bar.n = len(preparation.source) - self._images(self._missing)

    def own_shards(self) -> list[int]:
        """Return the shards that this rank has to write: every world-th one, of those that are missing."""
        return [shard for shard in sorted(self._missing) if shard % self._world == self._rank]

    def advance(self, images: int) -> None:
        """Count images that this rank has encoded for its current shard.

        Raises:
            DataError: another rank has failed.
            CheckpointError: the records are gone.
        """
        self._own += images
        if self._rank == 0 and time.monotonic() > self._polled + POLL_INTERVAL:
            self._poll()

    def wait(self, timeout: float) -> None:
        """Wait until the other ranks have written all their shards.

        Args:
            timeout: seconds without a new shard after which to give up.

        Raises:
            DataError: another rank has failed, or the timeout is over.
            CheckpointError: the records are gone.
        """
        self._poll()
        self._changed = time.monotonic()
        while self._missing:
            time.sleep(POLL_INTERVAL / 4)
            self._poll()
            if self._missing and time.monotonic() > self._changed + timeout:
                ranks = sorted({shard % self._world for shard in self._missing})
                raise DataError(
                    f"rank(s) {', '.join(map(str, ranks))} finished no shard within {timeout:g} s, and "
                    f"{len(self._missing)} of {self._preparation.shards} shards are missing in "
                    f"{self._preparation.out}; run the same command again to continue"
                )

    def _poll(self) -> None:
        now, parts = time.monotonic(), self._preparation.out / PARTS
        if not parts.is_dir():
            raise CheckpointError(
                f"{parts}: was removed, perhaps by another launch; run the same command again to continue."
            )
        missing = {shard for shard in self._missing if not self._preparation.is_done(shard)}
        if len(missing) < len(self._missing):
            self._changed = now
        others = [shard for shard in self._missing - missing if shard % self._world != self._rank]
        self._bar.update(self._own + self._images(others))
        self._own, self._missing, self._polled = 0, missing, now
        for note in parts.glob("failed-*"):
            rank = note.name.removeprefix("failed-")
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if rank != str(self._rank):
                    raise DataError(f"rank {rank} failed: {read_text(note, MAX_TEXT_BYTES)}")

    def _images(self, shards: Collection[int]) -> int:
        return sum(len(self._preparation.images(shard)) for shard in shards)
