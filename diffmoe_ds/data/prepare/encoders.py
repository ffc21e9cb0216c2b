"""What preparation stores for an image: its cropped pixels, or the latents of the image and its mirror image."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.images import centre_crop, open_rgb, png
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.vae import VAE
from diffmoe_ds.errors import DataError

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


class Encoder(Protocol):
    """Encodes images as tar members."""

    @property
    def latents(self) -> LatentFormat | None:
        """How latents are stored; None if pixels are."""

    def settings(self) -> dict[str, Any]:
        """Return everything that the bytes depend on, as plain data."""

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """Yield the member of each image, in order."""


class PixelEncoder:
    """Stores crops as PNG, which is lossless."""

    latents = None

    def __init__(self, size: int, threads: int = 1) -> None:
        self._size = size
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"kind": "images", "size": self._size}

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""
        for index, crop, reason in _crops(source, indices, self._size, self._threads):
            yield Encoded(index, unreadable=reason) if crop is None else Encoded(index, "png", png(crop))


class LatentEncoder:
    """Stores posteriors of a VAE.

    A batch holds images of one shard only.  The last bits of a latent may depend on its batch, and this way they depend
    neither on the rank that encodes the shard nor on the shards before it.
    """

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
                yield Encoded(index, "npy", self.latents.encode(stored), moments=found)
            else:
                yield Encoded(index, unreadable=f"its latent contains NaN or Inf in {self.latents.dtype}")


def _crops(
    source: Source, indices: Sequence[int], size: int, threads: int
) -> Iterator[tuple[int, np.ndarray | None, str]]:
    """Yield (index, crop as uint8 [3, size, size] or None, reason for None) in order; threads decode ahead."""

    def crop(index: int) -> tuple[np.ndarray | None, str]:
        try:
            return centre_crop(open_rgb(source.image_bytes(index)), size), ""
        except Exception as error:  # decoders raise many types on damaged bytes
            return None, str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"

    waiting: deque[tuple[int, Future[tuple[np.ndarray | None, str]]]] = deque()
    left = iter(indices)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for index in itertools.islice(left, threads * READ_AHEAD - len(waiting)):
                    waiting.append((index, pool.submit(crop, index)))
                if not waiting:
                    return
                index, future = waiting.popleft()
                yield index, *future.result()
        finally:
            pool.shutdown(cancel_futures=True)
