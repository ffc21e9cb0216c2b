"""An unfinished set of images: finished shards and a manifest of everything that determines them.

They stay in ``unfinished`` in the output directory until the set is complete. After a run is killed, the same command
continues with the missing shards.

Legend: B images of a shard, H, W height and width, C channels, L MoE layers, E experts.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmoe_ds.control_files import open_regular, read_json
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.files import (
    REMOVING_PREFIX,
    TMP_PREFIX,
    atomic_write,
    remove_leftovers,
    remove_tree,
    rename_for_removal,
    write_error,
    write_json,
)
from diffmoe_ds.npy import read_array, read_header, write_array
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.output import PNG
from diffmoe_ds.sampling.turns import Shard

FOLDER = "unfinished"
MANIFEST = "manifest.json"
MAX_SHARD_IMAGES = 1 << 30
"""Most images of a shard."""


class UnfinishedSet:
    """The files of a set of images that is not complete yet."""

    def __init__(self, out: Path) -> None:
        """Choose the paths without accessing them.

        Args:
            out: the output directory, on a file system that all ranks share.
        """
        self.out = out
        self.folder = out / FOLDER
        self._id = ""

    def open(self, settings: Mapping[str, Any], shard_images: int) -> None:
        """Create the set, or check that an unfinished one was started with the same settings.

        Args:
            settings: everything that determines the images, as plain data, keyed by option name.
            shard_images: images per shard of a new set; an existing set keeps its own number.

        Raises:
            CheckpointError: the directory cannot be created, read or written.
            ConfigError: the directory holds an unfinished set with different settings, or files not written by diffmoe.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"--out {self.out}: cannot create the directory: {error.strerror}.") from None
        try:
            for name in (FOLDER, PNG):  # partially removed by a killed run
                remove_tree(self.out / f"{REMOVING_PREFIX}{name}")
            self.folder.mkdir(exist_ok=True)
            self._check_owner()
            remove_leftovers(self.folder)
        except OSError as error:
            raise write_error(self.folder, error) from None
        self.identity()
        if not (self._id and any(self.folder.glob(f"*-{self._short_id()}.npy"))):
            self._id = uuid.uuid4().hex
            tree = {"settings": dict(settings), "shard_images": shard_images, "id": self._id}
            write_json(self.folder / MANIFEST, tree)
            return
        found = self._manifest()["settings"]
        wanted = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        for name in (*wanted, *found):
            if found.get(name) != wanted.get(name):
                raise ConfigError(
                    f"--out {self.out} holds an unfinished set that was started with --{name.replace('_', '-')} "
                    f"{_shown(found.get(name))}, got {_shown(wanted.get(name))}; use the same options to continue it, "
                    f"another --out, or remove {self.folder}."
                )

    def shard_images(self) -> int:
        """Return the images per shard.

        Raises:
            CheckpointError: the manifest cannot be read.
        """
        return int(self._manifest()["shard_images"])

    def identity(self) -> str:
        """Return the set's unique ID, or "not found" if this process cannot see the set.

        It is part of the shards' names, so every process calls this, or `open`, before it accesses shards.
        """
        try:
            self._id = self._manifest()["id"]
        except CheckpointError:
            return "not found"
        return self._id

    def finished(self, shards: Sequence[Shard]) -> list[bool]:
        """Return for each shard whether its file exists, from one listing of the directory.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        try:
            names = {path.name for path in self.folder.iterdir()}
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror}.") from None
        return [self._path(shard).name in names for shard in shards]

    def write(self, shard: Shard, pixels: Pixels, counts: Pixels) -> None:
        """Write a shard atomically: its images, followed by the tokens that experts took for them.

        Args:
            shard: the shard.
            pixels: uint8 [B, H, W, C].
            counts: int64 [L, E + 1], of a `CapacityMeter`.

        Raises:
            CheckpointError: the file cannot be written.
        """
        assert len(pixels) == len(shard.images) and pixels.dtype == np.uint8
        with atomic_write(self._path(shard)) as file:
            for array in (pixels, counts):
                write_array(file, array.shape, array.dtype, [array])

    def read(self, shard: Shard) -> Pixels:
        """Return the images of a shard, uint8 [B, H, W, C].

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        with self._reading(shard) as file:
            pixels: Pixels = read_array(file, os.fstat(file.fileno()).st_size)
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(shard.images):
                raise ValueError("not the images of the shard")
        return pixels

    def counts(self, shard: Shard) -> Pixels | None:
        """Return the counts of a shard, int64 [L, E + 1]; None if it was written by a version that did not count.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        with self._reading(shard) as file:
            images, size = read_header(file), os.fstat(file.fileno()).st_size
            after = images.length + images.array_bytes
            if after == size:
                return None
            file.seek(min(after, size))
            counts: Pixels = read_array(file, size - after)
            if counts.dtype != np.int64 or counts.ndim != 2:
                raise ValueError("not counts")
        return counts

    def discard_if_empty(self) -> None:
        """Remove the set if no shard is finished, ignoring errors."""
        if not any(self.folder.glob("*.npy")):
            remove_tree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove the shards and the manifest.

        Raises:
            CheckpointError: something cannot be removed.
        """
        try:
            remove_tree(rename_for_removal(self.folder))
        except OSError as error:
            raise write_error(self.folder, error) from None

    def _check_owner(self) -> None:
        """Check that the folder, which is removed in the end, belongs to a set or holds nothing but leftovers.

        Raises:
            ConfigError: it holds other files.
            OSError: it cannot be read.
        """
        try:
            self._manifest()
        except CheckpointError:
            if not all(path.name.startswith((TMP_PREFIX, REMOVING_PREFIX)) for path in self.folder.iterdir()):
                raise ConfigError(
                    f"{self.folder} exists but is not an unfinished set of diffmoe: {MANIFEST} is missing or damaged; "
                    "pass another --out or move it away."
                ) from None

    @contextmanager
    def _reading(self, shard: Shard) -> Iterator[BinaryIO]:
        """Open the file of a finished shard.

        Raises:
            CheckpointError: it is missing, or the block raises an error of numpy for damaged files.
        """
        path = self._path(shard)
        try:
            with open_regular(path) as file:
                yield file
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: the file of a finished shard is missing; --out must be on a file system that all ranks share."
            ) from None
        except (OSError, ValueError, EOFError):
            raise CheckpointError(
                f"{path}: is damaged; remove it and run the same command again to regenerate its images."
            ) from None

    def _path(self, shard: Shard) -> Path:
        """Return the file of a shard; the ID in its name keeps the shards of two sets apart."""
        assert self._id, "open() or identity() comes first"
        return self.folder / f"images-{shard.images.start:08d}-{shard.images.stop:08d}-{self._short_id()}.npy"

    def _short_id(self) -> str:
        return self._id[:8]

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            tree = read_json(path)
            if not (isinstance(tree["settings"], dict) and type(tree["shard_images"]) is int):
                raise ValueError
            if not 0 < tree["shard_images"] <= MAX_SHARD_IMAGES or not re.fullmatch("[0-9a-f]{32}", tree["id"]):
                raise ValueError
            return dict(tree)
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: cannot be read; remove {self.folder} to start over.") from None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
