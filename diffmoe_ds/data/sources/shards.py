"""Random access to the samples of WebDataset shards.

Images are read by their offset, which `tar_index.py` finds.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.control_files import open_descriptor, open_regular
from diffmoe_ds.data.sources.cache import ShardCache, shard_cache
from diffmoe_ds.data.sources.compressed import StoredBytes, unpack
from diffmoe_ds.data.sources.image_features import FEATURES_SUFFIX, FeatureFormat
from diffmoe_ds.data.sources.images import decode_pixels
from diffmoe_ds.data.sources.latents import LatentFormat, decode_array
from diffmoe_ds.data.sources.remote import is_url
from diffmoe_ds.data.sources.shard_paths import open_index
from diffmoe_ds.data.sources.tar_index import (
    IMAGE_SUFFIXES,
    NO_LABEL,
    NOT_STORED,
    Entry,
    Index,
    join,
    only_images,
    scan,
    without_labels,
)
from diffmoe_ds.data.sources.text_index import CAPTION_SUFFIXES, TEXT_SUFFIX, TextEntry, read_plain, read_records
from diffmoe_ds.errors import DataError
from diffmoe_ds.text import quoted, reason
from diffmoe_ds.text_features import Caption, TextFormat, padded_row

EMBEDDED = Path(__file__).parent.parent / "embedded" / "fashion-mnist-00000.tar.gz"
EMBEDDED_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

MAX_OPEN_FILES = 512  # per dataset and process; the usual limit is 1,024 per process
SCANNING_THREADS = 8  # scanning waits for the file system most of the time


class Sample(NamedTuple):
    """One image with its label."""

    image: np.ndarray  # [C, H, W]: uint8 of an image file (C is 1 or 3), float32 of a latent (.npy)
    label: int  # NO_LABEL in a set without labels
    key: str


class ShardDataset:
    """Random access to the samples of shards, in the order in which they are stored.

    A process that holds one may fork workers; a copy that is sent to another process opens its own files.

    Attributes:
        index: where the samples are.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        cache: ShardCache | None = None,
        use_index: bool = True,
        unlabelled: bool = False,
    ) -> None:
        """Open the shards.

        Args:
            shards: paths and URLs.
            cache: where URLs are downloaded to.
            use_index: use an existing index; otherwise the headers in the shards are read.
            unlabelled: ignore the labels.

        Raises:
            DataError: a shard is incomplete or has changed since it was indexed, a sample has no image or several,
                only some samples have labels, a member is too large, or the shards are empty.  Reading a sample raises
                it for invalid contents and for a shard that has changed.
        """
        assert shards, "expand() never gives an empty list"
        self._shards = [str(shard) for shard in shards]
        self._cache = cache or shard_cache(DataConfig())
        self._unpacked: dict[int, StoredBytes] = {}
        self._files: dict[int, tuple[io.FileIO, int]] = {}  # with the time of change; the least recently read first
        self.index = open_index(self._shards, self._cache, self._scan_all) if use_index else self._scan_all()
        if unlabelled:
            self.index = without_labels(self.index)
        if not len(self):
            others = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
            raise DataError(f"there is no sample in {shards[0]}{others}; expected images, each with a .cls")
        if self.labels.min() == NO_LABEL < self.labels.max():
            raise DataError(
                f"{self.describe(int(np.argmin(self.labels)))} has no label, but others do; expected a .cls next "
                "to every image, or to none"
            )

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entry(index)
        suffix = IMAGE_SUFFIXES[entry.suffix]
        data = self.image_bytes(index)
        try:
            image = decode_array(data) if suffix == "npy" else decode_pixels(data, suffix)
        except Exception as error:  # decoders raise many types on damaged bytes
            raise DataError(
                f"{self.describe(index)} has a .{suffix} that cannot be decoded: {reason(error)}"
            ) from error
        return Sample(image, entry.label, self.key(index))

    @property
    def latents(self) -> LatentFormat | None:
        """How latents are stored, if the shards hold prepared ones, which `read_moments` reads."""
        return self.index.latents

    @property
    def text(self) -> TextFormat | None:
        """How text features are stored, if the shards hold any, which `text_rows` reads."""
        return self.index.text_format

    @property
    def features(self) -> FeatureFormat | None:
        """How image features are stored, if the shards hold any, which `read_features` reads."""
        return self.index.feature_format

    @property
    def labels(self) -> np.ndarray:
        """Label of each sample, int64 [n]; all `NO_LABEL` in a dataset without labels."""
        return self.index.samples[:, Entry._fields.index("label")]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.index.shards]

    @property
    def classes(self) -> list[str] | None:
        """Name of each label, if the index of the shards lists names."""
        if self._shards == [str(EMBEDDED)]:
            return list(EMBEDDED_CLASSES)
        return None if self.index.classes is None else list(self.index.classes)

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        return self.index.key(index)

    def describe(self, index: int) -> str:
        """Return key and shard of a sample, for messages."""
        return f"sample {quoted(self.key(index))} of shard {self._shards[self._entry(index).shard]}"

    def suffix(self, index: int) -> str:
        """Return the format of a sample's image, the suffix of its member."""
        return IMAGE_SUFFIXES[self._entry(index).suffix]

    def image_bytes(self, index: int) -> bytes:
        """Return the stored bytes of a sample's image."""
        entry = self._entry(index)
        if entry.offset == NOT_STORED:
            raise DataError(f"{self.describe(index)} has a link or another special member for its image")
        return self._bytes(entry.shard, entry.offset, entry.size)

    def read_moments(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Read the latents of images or their mirror images: uint8 [B, half_bytes], see `LatentFormat`."""
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
                raise DataError(f"{self.describe(index)} has a .npy that is not a latent of {latents}")
        return rows

    def features_bytes(self, index: int) -> bytes:
        """Return the stored bytes of the image features of a sample and its mirror image."""
        assert self.index.features is not None
        return self._bytes(self._entry(index).shard, *self.index.features[index].tolist())

    def read_features(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Read the image features of samples or their mirror images: fp16 [B, T, F], see `FeatureFormat`.

        Raises:
            DataError: they cannot be read, or contain NaN or Inf.
        """
        assert self.features is not None and self.index.features is not None
        half = self.features.half_bytes
        rows = np.empty((len(indices), half), np.uint8)
        for row, index, mirror in zip(rows, indices, mirrored, strict=True):
            offset = int(self.index.features[index, 0])
            self._read(self._entry(index).shard, offset + half * mirror, [row], half)
        features = self.features.decode(rows)
        finite = np.isfinite(features).all(axis=(1, 2))
        if not finite.all():
            where = self.describe(indices[int(np.argmin(finite))])
            raise DataError(f"{where} has a .{FEATURES_SUFFIX} that contains NaN or Inf")
        return features

    def captions(self, index: int) -> list[str]:
        """Return the captions of a sample, from its `.txt` or `.json` or else its text features; none if it has none.

        Raises:
            DataError: they cannot be read.
        """
        if self._text is None:
            return []
        entry = TextEntry(*self._text[index].tolist())
        if entry.captions_offset == NOT_STORED:
            return [] if self.text is None else [caption.text for caption in self.read_captions(index)]
        try:
            return read_plain(entry, partial(self._bytes, self._entry(index).shard))
        except ValueError as error:
            where = f"{self.describe(index)} has a .{CAPTION_SUFFIXES[entry.suffix]}"
            raise DataError(f"{where} with invalid captions: {reason(error)}") from None

    def read_captions(self, index: int, choice: float | None = None) -> list[Caption]:
        """Return the captions of a sample with their text features.

        Args:
            index: the sample.
            choice: see `read_records`.

        Raises:
            DataError: they cannot be read.
        """
        assert self.text is not None and self.index.text is not None
        entry = TextEntry(*self.index.text[index].tolist())
        try:
            return read_records(entry, partial(self._bytes, self._entry(index).shard), self.text.layout, choice)
        except ValueError as error:
            where = f"{self.describe(index)} has a .{TEXT_SUFFIX}"
            raise DataError(f"{where} that cannot be decoded: {reason(error)}") from None

    def text_rows(self, indices: Sequence[int], choices: Sequence[float]) -> np.ndarray:
        """Read the text features of one caption of each sample.

        Args:
            indices: B samples.
            choices: for each, which of its captions, as a fraction from 0 (the first) to less than 1.

        Returns:
            fp16 [B, N], see `TextLayout`.

        Raises:
            DataError: they cannot be read.
        """
        assert self.text is not None
        layout, pairs = self.text.layout, zip(indices, choices, strict=True)
        return np.stack([padded_row(layout, self.read_captions(index, choice)[0].features) for index, choice in pairs])

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to download those shards that are URLs."""
        urls = [self._shards[number] for number in shards if is_url(self._shards[number])]
        if urls:
            self._cache.prefetch(urls)

    def remote_bytes(self) -> int:
        """Return the bytes of all shards that are URLs."""
        pairs = zip(self._shards, self.index.shards, strict=True)
        return sum(info.bytes for shard, info in pairs if is_url(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @cached_property
    def _text(self) -> np.ndarray | None:
        """Where captions are; indices from before they were stored lack them, so the shards are scanned."""
        if self.index.text is not None:
            return self.index.text
        found = self._scan_all()
        if len(found.samples) != len(self):
            raise DataError(f"shard {self._shards[0]} or others have changed; run diffmoe prepare check to find out")
        return found.text

    def _entry(self, index: int) -> Entry:
        return Entry(*self.index.samples[index].tolist())

    def _scan_all(self) -> Index:
        with ThreadPoolExecutor(SCANNING_THREADS) as pool:
            return join(list(pool.map(self._scan, range(len(self._shards)))))

    def _scan(self, number: int) -> Index:
        """Return the samples of a shard; if it is gzipped, its images are stored decompressed."""
        shard = self._shards[number]
        try:
            with os.fdopen(self._cache.open(shard), "rb") if is_url(shard) else open_regular(shard) as file:
                size = os.fstat(file.fileno()).st_size
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                if not packed:
                    return scan(shard, file, size)
                unpacked = unpack(shard, file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"shard {shard} is not a readable, complete tar or tar.gz file: {reason(error)}") from error
        index, images = only_images(scan(shard, io.BytesIO(unpacked), len(unpacked)), unpacked)
        self._unpacked[number] = StoredBytes(images)
        return index

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._read(number, offset, [buffer], size)
        return bytes(buffer)

    def _read(self, number: int, offset: int, buffers: list[Any], size: int) -> None:
        """Fill buffers of `size` bytes in total from a shard."""
        try:
            if number in self._unpacked:
                self._unpacked[number].read(offset, buffers)
                return
            file, changed = self._file(number)
            done = os.preadv(file.fileno(), buffers, offset)
            status = os.fstat(file.fileno())
        except OSError as error:
            raise DataError(f"shard {self._shards[number]} can no longer be read: {reason(error)}") from error
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
            file = io.FileIO(self._cache.open(shard, size) if is_url(shard) else open_descriptor(shard))
            kept = file, os.fstat(file.fileno()).st_mtime_ns
        self._files[number] = kept
        if len(self._files) > MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files)), None)  # closed when the last thread has read from it
        return kept
