"""What preparation stores for an image: its pixels, cropped or as they are, or latents of it and its mirror image."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.image_features import FEATURES_SUFFIX, STORED, FeatureFormat
from diffmoe_ds.data.sources.images import centre_crop, decode_pixels, open_rgb, png
from diffmoe_ds.data.sources.latents import LatentFormat, decode_array
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.vae import VAE
from diffmoe_ds.errors import DataError
from diffmoe_ds.text_features import TextFormat

Read = TypeVar("Read")
READ_AHEAD = 4
"""Images that each thread decodes ahead; decoding releases the GIL."""


@dataclass(frozen=True)
class Encoded:
    """The tar member of one image, or why it has none."""

    index: int
    """Index of the image in its source."""
    suffix: str = ""
    data: bytes = b""
    unreadable: str = ""
    """Why the image could not be encoded; empty if it was."""
    moments: np.ndarray | None = None
    """fp32 [2, 2, C, H, W] of a latent, for statistics."""
    crop: np.ndarray | None = None
    """uint8 [3, size, size]: the pixels of a crop, for image features."""
    more: tuple[tuple[str, bytes], ...] = ()
    """Suffix and contents of further members."""
    captions: int = 0
    """Number of captions with features."""
    truncated: int = 0
    """How many of them have more tokens than an encoder reads."""


class Encoder(Protocol):
    """Encodes images as tar members."""

    @property
    def latents(self) -> LatentFormat | None:
        """How latents are stored; None if pixels are."""

    @property
    def text(self) -> TextFormat | None:
        """How text features are stored; None if there are none."""

    @property
    def features(self) -> FeatureFormat | None:
        """How image features are stored; None if there are none."""

    def settings(self) -> dict[str, Any]:
        """Return everything that the bytes depend on, as plain data."""

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """Yield the member of each image, in order."""


class PixelEncoder:
    """Stores crops as PNG, which is lossless."""

    latents = None
    text = None
    features = None

    def __init__(self, size: int, threads: int = 1) -> None:
        self._size = size
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"kind": "images", "size": self._size}

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""
        for index, crop, reason in _crops(source, indices, self._size, self._threads):
            yield Encoded(index, unreadable=reason) if crop is None else Encoded(index, "png", png(crop), crop=crop)


class StoredEncoder:
    """Stores image files or prepared latents, and their image features, byte for byte, if they can be decoded."""

    text = None

    def __init__(self, source: Source, threads: int = 1) -> None:
        """Describe the images.

        Args:
            source: the images, or shards with prepared latents or image features.
            threads: decoding threads.
        """
        self._shards = source if isinstance(source, ShardDataset) else None
        self.latents = None if self._shards is None else self._shards.latents
        self.features = None if self._shards is None else self._shards.features
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        found: dict[str, Any] = {"kind": "stored", "latents": None if self.latents is None else self.latents.to_json()}
        return found if self.features is None else {**found, "features": self.features.to_json()}

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""

        def read(index: int) -> Encoded:
            suffix, data, moments = source.suffix(index), source.image_bytes(index), None
            if self.latents is not None:
                moments = self._moments(data)
            elif suffix == "npy":
                decode_array(data)
            else:
                decode_pixels(data, suffix)
            return Encoded(index, suffix, data, moments=moments, more=self._image_features(index))

        for index, encoded, reason in _read_ahead(read, indices, self._threads):
            yield Encoded(index, unreadable=reason) if encoded is None else encoded

    def _image_features(self, index: int) -> tuple[tuple[str, bytes], ...]:
        """Return the member with the image features of a sample, if it has any."""
        if self._shards is None or self.features is None:
            return ()
        data = self._shards.features_bytes(index)
        if not np.isfinite(np.frombuffer(data, STORED)).all():
            raise ValueError(f"its .{FEATURES_SUFFIX} contains NaN or Inf")
        return ((FEATURES_SUFFIX, data),)

    def _moments(self, data: bytes) -> np.ndarray:
        """Return the moments of a latent and of its mirror image, fp32 [2, 2, C, H, W]."""
        assert self.latents is not None and len(data) == self.latents.member_bytes, len(data)
        header = self.latents.header
        if not data.startswith(header):
            raise ValueError("its .npy is not a latent of the format of its shard")
        halves = np.frombuffer(bytearray(data), np.uint8, offset=len(header)).reshape(2, -1)
        moments = self.latents.decode(halves)
        if not np.isfinite(moments).all():
            raise ValueError("its latent contains NaN or Inf")
        return moments


class LatentEncoder:
    """Stores posteriors of a VAE.

    A batch holds images of one shard only.  The last bits of a latent may depend on its batch, and this way they depend
    neither on the rank that encodes the shard nor on the shards before it.
    """

    text = None
    features = None

    def __init__(self, vae: VAE, size: int, dtype: str, batch_size: int, threads: int = 1) -> None:
        self.latents = vae.format(size, dtype)
        self._vae = vae
        self._batch_size = batch_size
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "kind": "latents",
            "size": self.latents.image_size,
            "dtype": self.latents.dtype,
            "vae": self.latents.vae,
            "batch_size": self._batch_size,
            "device": self._vae.device.type,
        }

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""
        crops = _crops(source, indices, self.latents.image_size, self._threads)
        while batch := list(itertools.islice(crops, self._batch_size)):
            yield from self._batch(batch)

    def _batch(self, batch: list[tuple[int, np.ndarray | None, str]]) -> Iterator[Encoded]:
        images = [crop for _, crop, _ in batch if crop is not None]
        moments: Iterator[np.ndarray] = iter(())
        if images:
            both = np.stack(images)
            mirrored = np.ascontiguousarray(both[..., ::-1])
            moments = iter(np.stack([self._vae.moments(both), self._vae.moments(mirrored)], axis=1))
        for index, crop, reason in batch:
            if crop is None:
                yield Encoded(index, unreadable=reason)
                continue
            found = next(moments)
            with np.errstate(over="ignore"):
                stored = found.astype(self.latents.dtype)
            if np.isfinite(stored).all():
                yield Encoded(index, "npy", self.latents.encode(stored), moments=found, crop=crop)
            else:
                yield Encoded(index, unreadable=f"its latent contains NaN or Inf in {self.latents.dtype}")


def _crops(
    source: Source, indices: Sequence[int], size: int, threads: int
) -> Iterator[tuple[int, np.ndarray | None, str]]:
    """Yield (index, crop as uint8 [3, size, size] or None, reason for None) in order; threads decode ahead."""
    return _read_ahead(lambda index: centre_crop(open_rgb(source.image_bytes(index)), size), indices, threads)


def _read_ahead(
    read: Callable[[int], Read], indices: Sequence[int], threads: int
) -> Iterator[tuple[int, Read | None, str]]:
    """Yield (index, what `read` returns or None, reason for None) in order; threads read ahead."""

    def attempt(index: int) -> tuple[Read | None, str]:
        try:
            return read(index), ""
        except Exception as error:  # decoders raise many types on damaged bytes
            return None, str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"

    waiting: deque[tuple[int, Future[tuple[Read | None, str]]]] = deque()
    left = iter(indices)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for index in itertools.islice(left, threads * READ_AHEAD - len(waiting)):
                    waiting.append((index, pool.submit(attempt, index)))
                if not waiting:
                    return
                index, future = waiting.popleft()
                yield index, *future.result()
        finally:
            pool.shutdown(cancel_futures=True)
