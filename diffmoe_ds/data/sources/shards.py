"""Random access to the samples of WebDataset shards: which shards a path names, and reading one sample of them.

An image is read by its offset when it is asked for; `tar_index.py` says where it lies.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.data.sources.cache import ShardCache, shard_cache
from diffmoe_ds.data.sources.images import decode_pixels
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.remote import is_url
from diffmoe_ds.data.sources.shard_paths import is_gzip, kept_index, prepared_index, shard_size
from diffmoe_ds.data.sources.tar_index import (
    IMAGE_SUFFIXES,
    NO_LABEL,
    NOT_STORED,
    Entry,
    Index,
    join,
    scan,
    without_labels,
)
from diffmoe_ds.errors import DataError

EMBEDDED = Path(__file__).parent.parent / "embedded" / "fashion-mnist-00000.tar.gz"

MAX_UNPACKED_BYTES = 4 << 30  # of one .tar.gz, which is held in memory
MAX_OPEN_FILES = 512  # per data set and process; the usual limit is 1,024 per process
SCANNING_THREADS = 8  # scanning waits for the file system most of the time
KEEP_INDEX_FROM_BYTES = 1 << 30  # of shards without an index: the one that was made by scanning is kept beside them


class Sample(NamedTuple):
    image: np.ndarray  # [C, H, W]: uint8 of an image file (C is 1 or 3), float32 of a latent (.npy)
    label: int  # NO_LABEL in a set without labels
    key: str


class ShardDataset:
    """Random access to the samples of ``shards``, in the order in which they are stored.

    ``shards`` are paths and URLs, which are fetched into ``cache``.  Workers may be forked from a process that holds
    one; a copy sent to another process opens its own files.  Without ``use_index`` the shards' own headers are read;
    ``unlabelled`` ignores the labels.

    ``index`` says where the samples lie.

    Raises ``DataError`` if a shard cannot be read to its end or has changed since its index was made, a sample lacks
    an image or has several, some samples have labels and others none, a member is too big, or there is no sample at
    all; reading raises it for contents that cannot be decoded and for a shard that has changed.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        cache: ShardCache | None = None,
        use_index: bool = True,
        unlabelled: bool = False,
    ):
        assert shards, "expand() never gives an empty list"
        self._shards = [str(shard) for shard in shards]
        self._cache = cache or shard_cache(DataConfig())
        self._unpacked: dict[int, bytes] = {}
        self._files: dict[int, tuple[io.FileIO, int]] = {}  # with the time of change; the least recently read first
        self.index = self._open_index() if use_index else self._scan_all()
        if unlabelled:
            self.index = without_labels(self.index)
        if not len(self):
            others = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
            raise DataError(f"there is no sample in {shards[0]}{others}; expected an image for each, and a .cls")
        missing = self.labels == NO_LABEL
        if missing.any() and not missing.all():
            raise DataError(
                f"{self.describe(int(np.argmax(missing)))} has no label, but others have; expected a .cls stored next "
                "to each image, or to none"
            )

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entry(index)
        suffix = IMAGE_SUFFIXES[entry.suffix]
        data = self.image_bytes(index)
        try:
            image = _decode_latent(data) if suffix == "npy" else decode_pixels(data, suffix)
        except Exception as error:  # what a decoder raises on damaged bytes depends on the bytes
            raise DataError(f"{self.describe(index)} has a .{suffix} that cannot be decoded: {error}") from error
        return Sample(image, entry.label, self.key(index))

    @property
    def latents(self) -> LatentFormat | None:
        """How the latents were made, if the shards hold prepared ones; they are read by ``read_halves``."""
        return self.index.latents

    @property
    def labels(self) -> np.ndarray:
        """int64 label of each sample; all ``NO_LABEL`` in a set without labels."""
        return self.index.samples[:, Entry._fields.index("label")]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.index.shards]

    @property
    def classes(self) -> None:
        """Shards have numbers for classes, but no names."""
        return None

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self.index.key(index)

    def describe(self, index: int) -> str:
        """Key and shard of a sample, for messages."""
        return f"sample {self.key(index)!r} of shard {self._shards[self._entry(index).shard]}"

    def image_bytes(self, index: int) -> bytes:
        """A sample's image as it is stored."""
        entry = self._entry(index)
        if entry.offset == NOT_STORED:
            raise DataError(f"{self.describe(index)} has a link or another special member for its image")
        buffer = bytearray(entry.size)
        self._read(entry.shard, entry.offset, [buffer], entry.size)
        return bytes(buffer)

    def read_halves(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """The stored latents of images or their mirror images: uint8 ``[B, half_bytes]``, see ``LatentFormat``."""
        latents = self.latents
        assert latents is not None
        header, half = latents.header, latents.half_bytes
        found = bytearray(len(header))
        rows = np.empty((len(indices), half), np.uint8)
        entries = self.index.samples[list(indices)].tolist()
        for row, values, index, mirror in zip(rows, entries, indices, mirrored, strict=True):
            entry = Entry(*values)
            if mirror:
                self._read(entry.shard, entry.offset + len(header) + half, [row], half)
                continue
            self._read(entry.shard, entry.offset, [found, row], len(header) + half)
            if found != header:
                raise DataError(f"{self.describe(index)} has a .npy that is no latent of {latents}")
        return rows

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch those of these shards that are URLs."""
        urls = [self._shards[number] for number in shards if is_url(self._shards[number])]
        if urls:
            self._cache.prefetch(urls)

    def remote_bytes(self) -> int:
        """Bytes of all shards that are URLs."""
        pairs = zip(self._shards, self.index.shards, strict=True)
        return sum(info.bytes for shard, info in pairs if is_url(shard))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def _entry(self, index: int) -> Entry:
        return Entry(*self.index.samples[index].tolist())

    def _open_index(self) -> Index:
        """From the index beside the shards if there is one, otherwise by reading their headers."""
        found = prepared_index(self._shards, self._cache)
        if found is not None:
            self._check_sizes(found)
            return found
        local = [shard for shard in self._shards if not is_url(shard)]
        if local != self._shards:
            folder = self._cache.folder.expanduser()
        else:
            folder = Path(local[0]).parent
            if sum(map(shard_size, local)) < KEEP_INDEX_FROM_BYTES:
                folder = None
        if any(map(is_gzip, local)):
            folder = None  # they have to be unpacked at every start
        return kept_index(folder, self._shards, self._scan_all)

    def _check_sizes(self, index: Index) -> None:
        for shard, info in zip(self._shards, index.shards, strict=True):
            if not is_url(shard) and (size := shard_size(shard)) != info.bytes:
                raise DataError(
                    f"shard {shard} has {size} bytes, but its index says {info.bytes}: it changed after it was made; "
                    "diffmoe prepare check says which shards are whole"
                )

    def _scan_all(self) -> Index:
        with ThreadPoolExecutor(SCANNING_THREADS) as pool:
            return join(list(pool.map(self._scan, range(len(self._shards)))))

    def _scan(self, number: int) -> Index:
        """The samples of a shard, unpacked into memory first if it is gzipped."""
        shard = self._shards[number]
        try:
            with open(self._cache.open(shard) if is_url(shard) else shard, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                if not packed:
                    return scan(shard, file, size)
                self._unpacked[number] = _unpack(shard, file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"shard {shard} is not a readable, complete tar or tar.gz file: {error}") from error
        return scan(shard, io.BytesIO(self._unpacked[number]), len(self._unpacked[number]))

    def _read(self, number: int, offset: int, buffers: list, size: int) -> None:
        """Fill the buffers, of ``size`` bytes together, from a shard."""
        if number in self._unpacked:
            for buffer in buffers:
                buffer[:] = memoryview(self._unpacked[number])[offset : offset + len(buffer)]
                offset += len(buffer)
            return
        try:
            file, changed = self._file(number)
            done = os.preadv(file.fileno(), buffers, offset)
            status = os.fstat(file.fileno())
        except OSError as error:
            raise DataError(f"shard {self._shards[number]} can no longer be read: {error}") from error
        if done != size or status.st_size != self.index.shards[number].bytes or status.st_mtime_ns != changed:
            raise DataError(
                f"shard {self._shards[number]} has {status.st_size} bytes where {self.index.shards[number].bytes} "
                "were indexed, or was written to: it changed after opening"
            )

    def _file(self, number: int) -> tuple[io.FileIO, int]:
        kept = self._files.pop(number, None)
        if kept is None:
            shard = self._shards[number]
            size = self.index.shards[number].bytes
            file = io.FileIO(self._cache.open(shard, size) if is_url(shard) else shard)
            kept = file, os.fstat(file.fileno()).st_mtime_ns
        self._files[number] = kept
        if len(self._files) > MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files)), None)  # closed when no thread reads it any more
        return kept


def _unpack(shard: str, file: io.BufferedIOBase) -> bytes:
    chunks, total = [], 0
    with gzip.open(file) as stream:
        while chunk := stream.read(1 << 24):
            chunks.append(chunk)
            total += len(chunk)
            if total > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"shard {shard} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB of memory; "
                    "store it as a plain .tar, which is read in place"
                )
    return b"".join(chunks)


def _decode_latent(data: bytes) -> np.ndarray:
    """float32 ``[C, H, W]`` of a latent that is stored as one array, as it is."""
    # read_array and not np.load, which would also take a zip archive or, if allowed, a bare pickle.
    latent = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        values = np.ascontiguousarray(latent, np.float32) if latent.dtype.kind == "f" else None
    if values is None or values.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(f"{latent.dtype} array of shape {latent.shape}, expected finite floats of shape (C, H, W)")
    return values
