"""Sets of images to evaluate: an .npz file in ADM's layout, a folder of images, or shards.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.data.dataset import open_source
from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.images import centre_crop, open_rgb
from diffmoe_ds.data.sources.shard_paths import why_not_shards
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation.npz import NpzReader
from diffmoe_ds.files import expand_user
from diffmoe_ds.sampling.output import LABELS, PNG, SAMPLES
from diffmoe_ds.text import counted, reason

MAX_SIDE = 4096
MAX_BATCH_BYTES = 256 << 20
DECODING_THREADS = 4


class Images(Protocol):
    """Images of the same size."""

    size: tuple[int, int]
    """Height and width."""

    @property
    def together(self) -> int:
        """Number of consecutive images that must not be split over ranks."""

    def __len__(self) -> int: ...
    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Yield images `start` to `stop` - 1 as uint8 [B, C, H, W], at most `batch_size` at a time."""


class NpzImages:
    """The array ``arr_0`` of an .npz file: uint8 [N, H, W, C], C 1 or 3.

    Attributes:
        reader: the file.
        size: height and width.
    """

    together = 1

    def __init__(self, reader: NpzReader) -> None:
        """Check the array.

        Raises:
            DataError: it is not an array of images, or holds fewer than 2.
        """
        header = reader.header("arr_0")
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(
                f"{reader.path}: arr_0 is {header.describe()}; expected images, uint8 [N, height, width, 1 or 3]."
            )
        if not all(0 < side <= MAX_SIDE for side in shape[1:3]):
            raise DataError(
                f"{reader.path}: images of {shape[1]}x{shape[2]} pixels; height and width must be from 1 to {MAX_SIDE}."
            )
        check_count(shape[0], str(reader.path))
        self.reader = reader
        self._count = shape[0]
        self.size = shape[1], shape[2]
        self._at_once = max(1, MAX_BATCH_BYTES // (shape[1] * shape[2] * shape[3]))

    def __len__(self) -> int:
        return self._count

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [B, C, H, W].

        Raises:
            DataError: the file is damaged.
        """
        for part in self.reader.rows("arr_0", start, stop, min(batch_size, self._at_once)):
            yield torch.from_numpy(part.transpose(0, 3, 1, 2).copy())


class FileImages:
    """The images of a folder or of shards, without their labels.

    Attributes:
        source: the folder or shards.
        size: height and width.
    """

    together = 1

    def __init__(self, path: str, size: tuple[int, int] | None = None) -> None:
        """List the images.

        Args:
            path: a folder, in which images are found at any depth, or shards.
            size: size to which images are converted: smaller images in shards are zero-padded as in training, others
                are resized and cropped, even larger ones in shards, which training rejects. If None, all images must
                have the size of the first.

        Raises:
            DataError: there are fewer than 2 images, they are latents, or the first cannot be decoded.
        """
        self.source: Source | ShardDataset = open_source(path, unlabelled=True)
        self._pads = isinstance(self.source, ShardDataset)
        if isinstance(self.source, ShardDataset) and self.source.latents is not None:
            raise DataError(f"{path}: the shards hold latents; expected images.")
        check_count(len(self.source), path)
        self._asked = size
        self.size = size or tuple(self._decode(0).shape[1:])
        if size is not None and size[0] != size[1] and tuple(self._decode(0).shape[1:]) != size:
            raise DataError(
                f"{path}: images must be {size[0]}x{size[1]} pixels; others can only be cropped to squares."
            )

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [B, 3, H, W], decoding the next batch in the background.

        Raises:
            DataError: an image cannot be decoded, or differs in size from the first.
        """
        together = min(batch_size, max(1, MAX_BATCH_BYTES // (3 * self.size[0] * self.size[1])))
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            ahead = [pool.submit(self._read, index) for index in range(start, min(start + together, stop))]
            for first in range(start, stop, together):
                now = ahead
                following = range(first + together, min(first + 2 * together, stop))
                ahead = [pool.submit(self._read, index) for index in following]
                yield torch.from_numpy(np.stack([future.result() for future in now]))

    def _read(self, index: int) -> np.ndarray:
        """Return an image, checked to have the common size, uint8 [3, H, W]."""
        image = self._decode(index)
        if image.shape[1:] != self.size:
            raise DataError(
                f"{self.source.describe(index)} has {image.shape[1]}x{image.shape[2]} pixels, but the first image "
                f"has {self.size[0]}x{self.size[1]}; the evaluated images must all have the same size."
            )
        return image

    def _decode(self, index: int) -> np.ndarray:
        data = self.source.image_bytes(index)
        try:
            picture = open_rgb(data)
            size = self._asked
            found = picture.height, picture.width
            if size is None or found == size or (self._pads and found[0] <= size[0] and found[1] <= size[1]):
                image = np.asarray(picture).transpose(2, 0, 1)
                return image if size is None or found == size else _padded(image, size)
            return centre_crop(picture, size[0])
        except Exception as error:  # decoders raise many types on damaged bytes
            raise DataError(f"{self.source.describe(index)} cannot be decoded: {reason(error)}") from error


def open_images(path: str, size: tuple[int, int] | None = None, option: str = "--samples") -> Images:
    """Open images for evaluation.

    Args:
        path: an .npz file, a folder, or shards.
        size: size to which images of a folder or shards are converted, see `FileImages`; an .npz must have it.
        option: that names the images, for messages.

    Raises:
        DataError: the images cannot be read or used.
    """
    if not path.endswith(".npz"):
        problem = why_not_shards(path)
        if problem is not None:
            raise DataError(
                f"{option} {path} {problem}; expected an .npz file, a folder of images or shards (*.tar or *.tar.gz)."
            )
        return FileImages(path, size)
    images = NpzImages(NpzReader(expand_user(path)))
    check_size(path, images.size, size)
    return images


def generated_images(path: str) -> str:
    """Return the images in a directory that ``diffmoe sample`` has written; any other path is returned unchanged."""
    folder = expand_user(path)
    if (folder / SAMPLES).is_file():
        return str(folder / SAMPLES)
    return str(folder / PNG) if (folder / PNG / LABELS).is_file() else path


def check_size(path: str, found: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Check that reference images have the same size as the evaluated ones.

    Raises:
        DataError: they do not.
    """
    if expected is not None and found != expected:
        raise DataError(
            f"{path}: the images have {found[0]}x{found[1]} pixels, but the evaluated ones {expected[0]}x{expected[1]};"
            " resizing would change every metric, so compare images of the same size."
        )


def check_count(count: int, path: str) -> None:
    """Check that there are enough images for a covariance.

    Raises:
        DataError: there are fewer than 2.
    """
    if count < 2:
        raise DataError(f"{path}: {counted(count, 'image')}; metrics need at least 2.")


def _padded(image_CHW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pad with zeros on all sides, as training does."""
    height, width = image_CHW.shape[1:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.zeros((len(image_CHW), *size), np.uint8)
    padded[:, top : top + height, left : left + width] = image_CHW
    return padded
