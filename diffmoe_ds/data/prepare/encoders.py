"""What preparation stores of an image: its cropped pixels, or the latents of it and of its mirror image."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.images import centre_crop, open_rgb, png
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.vae import VAE
from diffmoe_ds.errors import DataError

READ_AHEAD = 4
"""Images decoded ahead by each thread; decoding lets other threads run."""


class Encoded(NamedTuple):
    """What became of one image: its member, or why there is none."""

    index: int  # of the image in its source
    suffix: str = ""
    data: bytes = b""
    unreadable: str = ""
    moments: np.ndarray | None = None  # fp32 [2, 2, C, H, W] of a latent, for statistics


class Encoder(Protocol):
    """Turns images into members, in their order, each exactly once."""

    latents: LatentFormat | None

    def settings(self) -> dict[str, Any]:
        """All that the bytes depend on, as plain data."""

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]: ...


class PixelEncoder:
    """Crops of ``size`` pixels as PNG, which loses nothing."""

    latents = None

    def __init__(self, size: int, threads: int = 1):
        self._size = size
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See ``Encoder``."""
        return {"kind": "images", "size": self._size}

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See ``Encoder``."""
        for index, crop, reason in _crops(source, indices, self._size, self._threads):
            yield Encoded(index, unreadable=reason) if crop is None else Encoded(index, "png", png(crop))


class LatentEncoder:
    """Posteriors of a VAE.

    Batches are cut from the images of one shard alone, so that a latent's last bits, which may depend on its batch,
    do not depend on who encodes the shard or on what was encoded before.
    """

    def __init__(self, vae: VAE, size: int, dtype: str, batch_size: int, threads: int = 1):
        self.latents = vae.format(size, dtype)
        self._vae = vae
        self._batch_size = batch_size
        self._threads = threads

    def settings(self) -> dict[str, Any]:
        """See ``Encoder``."""
        return {
            "kind": "latents",
            "size": self.latents.image_size,
            "dtype": self.latents.dtype,
            "vae": self.latents.vae,
            "batch_size": self._batch_size,
            "device": self._vae.device.type,
        }

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See ``Encoder``."""
        crops = _crops(source, indices, self.latents.image_size, self._threads)
        while batch := list(itertools.islice(crops, self._batch_size)):
            yield from self._batch(batch)

    def _batch(self, batch: list[tuple[int, np.ndarray | None, str]]) -> Iterator[Encoded]:
        images = [crop for _, crop, _ in batch if crop is not None]
        moments = iter(())
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
                yield Encoded(index, unreadable=f"its latent is not finite in {self.latents.dtype}")


def _crops(
    source: Source, indices: Sequence[int], size: int, threads: int
) -> Iterator[tuple[int, np.ndarray | None, str]]:
    """(index, uint8 [3, size, size] or none, why none) of each image in order, decoded ahead by threads."""

    def crop(index: int) -> tuple[np.ndarray | None, str]:
        try:
            return centre_crop(open_rgb(source.image_bytes(index)), size), ""
        except Exception as error:  # what a decoder raises on damaged bytes depends on the bytes
            return None, str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"

    waiting: deque[tuple[int, Future]] = deque()
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
