"""An unfinished set of images: finished shards and a manifest of everything that determines them.

They stay in ``unfinished`` in the output directory until the set is complete. After a run is killed, the same command
continues with the missing shards.

Everything is written in a directory of the command's own and moved from there, so that a command that was suspended
cannot change a set that another one has taken over; see `diffmoe_ds.outputs`.

Legend: B images of a shard, H, W height and width, C channels, L MoE layers, E experts.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmoe_ds.control_files import open_regular, read_json
from diffmoe_ds.errors import CheckpointError, ConfigError, DiffMoEError
from diffmoe_ds.files import (
    REMOVING_PREFIX,
    TMP_PREFIX,
    atomic_write,
    remove_leftovers,
    remove_tree,
    write_error,
    write_text,
)
from diffmoe_ds.npy import read_array, read_header, write_array
from diffmoe_ds.outputs import fence_others, make_directory, own_directory, taken_over
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.output import PNG
from diffmoe_ds.sampling.turns import Shard
from diffmoe_ds.text import shortened

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
        self.own = own_directory(out, "sample")  # on the other ranks, `identity` replaces it with that of rank 0
        self._id = ""
        self._shapes: dict[str, tuple[int, ...]] = {}

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
            self.own.mkdir(parents=True)  # a process that fails just now may remove the empty output directory
        except OSError as error:
            raise write_error(self.folder, error) from None
        try:
            self._continued(settings)  # an error leaves the set to the process that is writing it
            fence_others(self.own)
            for name in (FOLDER, PNG):  # partially removed by a killed run of an earlier version
                remove_tree(self.out / f"{REMOVING_PREFIX}{name}")
            tree = self._continued(settings)
            remove_leftovers(self.folder)
            tree = tree or {"settings": dict(settings), "shard_images": shard_images, "id": uuid.uuid4().hex}
            write_text(self.folder / MANIFEST, json.dumps({**tree, "owner": self.own.name}, indent=1) + "\n", self.own)
        except (OSError, DiffMoEError) as error:
            found = None if isinstance(error, ConfigError) else self.taken_over()
            remove_tree(self.own, ignore_errors=True)
            raise found or (write_error(self.folder, error) if isinstance(error, OSError) else error) from None
        self._id = tree["id"]

    def taken_over(self) -> CheckpointError | None:
        """Return the error to report if another process has opened the set since; None if this one still owns it."""
        return taken_over(self.own, self.out)

    def shard_images(self) -> int:
        """Return the images per shard.

        Raises:
            CheckpointError: the manifest cannot be read.
        """
        return int(self._manifest()["shard_images"])

    def identity(self) -> str:
        """Return what identifies the set and the process that opened it, or "not found" if the set cannot be seen.

        Both are part of the names of files, so every process calls this, or `open`, before it accesses shards.
        """
        if not self._id:
            try:
                tree = self._manifest()
            except CheckpointError:
                return "not found"
            self._id, self.own = tree["id"], self.out / tree["owner"]
        return f"{self._id} {self.own.name}"

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
        with atomic_write(self._path(shard), self.own) as file:
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
            if not pixels.size or pixels.shape[3] not in (1, 3):
                raise ValueError("not images")
        self._check_shape(shard, "images", pixels.shape[1:])
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
            if counts.dtype != np.int64 or counts.ndim != 2 or not counts.shape[1]:
                raise ValueError("not counts")
        self._check_shape(shard, "counts", counts.shape)
        return counts

    def _check_shape(self, shard: Shard, what: str, shape: tuple[int, ...]) -> None:
        """Check that an array of a shard has the same shape as those of the shards that were read before.

        Raises:
            CheckpointError: it does not; either shard may be the wrong one.
        """
        first = self._shapes.setdefault(what, shape)
        if shape != first:
            raise CheckpointError(
                f"{self._path(shard)}: its {what} have the shape {list(shape)}, but those of another shard "
                f"{list(first)}; remove {self.folder} to start over."
            )

    def discard_if_empty(self, others: bool = False) -> None:
        """Remove the set if no shard is finished, and the output directory if it is then empty, ignoring errors.

        Args:
            others: whether other ranks may still be writing shards, in the same directory of their own, which then
                stays until the set is opened again.
        """
        is_empty = not any(self.folder.glob("*.npy"))
        if is_empty:
            with suppress(OSError):
                self.discard(self.folder)
        if is_empty or not others:
            remove_tree(self.own, ignore_errors=True)
        with suppress(OSError):  # it may hold other files
            self.out.rmdir()

    def discard(self, path: Path) -> None:
        """Remove something from the output directory, if it exists; if this process is killed, it is there or not.

        Raises:
            OSError: it cannot be removed, for example because another process has opened the set since.
        """
        if os.path.lexists(path):
            remove_tree(path.rename(self.own / f"{REMOVING_PREFIX}{path.name}"))

    def remove(self) -> None:
        """Remove the shards, the manifest and this process's own directory.

        Raises:
            CheckpointError: something cannot be removed.
        """
        try:
            self.discard(self.folder)
            remove_tree(self.own)
        except OSError as error:
            raise write_error(self.folder, error) from None

    def _continued(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the manifest of the set to continue; None if no shard is finished.

        Raises:
            ConfigError: the set was started with different settings, or the folder, which is removed in the end,
                holds files that are not those of a set.
            OSError: the folder cannot be created or read.
        """
        make_directory(self.folder, self.own)
        try:
            tree = self._manifest()
        except CheckpointError:
            if not all(path.name.startswith((TMP_PREFIX, REMOVING_PREFIX)) for path in self.folder.iterdir()):
                raise ConfigError(
                    f"{self.folder} exists but is not an unfinished set of diffmoe: {MANIFEST} is missing or damaged; "
                    "pass another --out or move it away."
                ) from None
            return None
        if not any(self.folder.glob(f"*-{_short(tree['id'])}.npy")):
            return None
        found, wanted = tree["settings"], json.loads(json.dumps(settings))  # tuples become lists, as in the file
        for name in (*wanted, *found):
            if found.get(name) != wanted.get(name):
                before, now = (shortened(str(each.get(name))) for each in (found, wanted))
                raise ConfigError(
                    f"--out {self.out} holds an unfinished set that was started with --{name.replace('_', '-')} "
                    f"{before}, got {now}; use the same options to continue it, give "
                    f"another --out, or remove {self.folder}."
                )
        return tree

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
        return self.folder / f"images-{shard.images.start:08d}-{shard.images.stop:08d}-{_short(self._id)}.npy"

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            tree = read_json(path)
            if not (isinstance(tree["settings"], dict) and type(tree["shard_images"]) is int):
                raise ValueError
            if not 0 < tree["shard_images"] <= MAX_SHARD_IMAGES or not re.fullmatch("[0-9a-f]{32}", tree["id"]):
                raise ValueError
            if not re.fullmatch(f"({re.escape(TMP_PREFIX)}sample-[0-9a-f]{{12}})?", tree.setdefault("owner", "")):
                raise ValueError
            return dict(tree)
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: cannot be read; remove {self.folder} to start over.") from None


def _short(identity: str) -> str:
    return identity[:8]
