"""Look at a folder of images or at shards, to write a recipe that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from diffmoe_ds.data.dataset import is_missing, open_source
from diffmoe_ds.data.sources.folder import ImageFolder, Source
from diffmoe_ds.data.sources.images import open_rgb
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.tar_index import NO_LABEL
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import expand_user
from diffmoe_ds.text import reason

LOOKED_AT = 200
"""Largest number of images that are decoded."""


def _decoded(source: ShardDataset | Source, index: int) -> np.ndarray:
    """Return an image as training reads it, uint8 [H, W, C]; those in a folder are RGB before they are converted."""
    if isinstance(source, ShardDataset):
        image_CHW: np.ndarray = source[index].image
        return image_CHW.transpose(1, 2, 0)
    return np.asarray(open_rgb(source.image_bytes(index)))


def _latent_shape(source: ShardDataset | Source) -> tuple[int, int, int] | None:
    """Return the (C, H, W) of the latents in shards, prepared ones or plain .npy files; None for images."""
    if not isinstance(source, ShardDataset):
        return None
    if source.latents is not None:
        return source.latents.shape
    for index in range(min(len(source), LOOKED_AT)):
        with suppress(DataError):  # the first readable one decides
            image_CHW = source[index].image
            channels, height, width = image_CHW.shape
            return (channels, height, width) if image_CHW.dtype == np.float32 else None
    return None


@dataclass(frozen=True)
class Survey:
    """What a set of images contains."""

    num_images: int
    """Number of images."""
    class_names: tuple[str, ...] | None
    """Name of each label, if labels have names."""
    num_classes: int
    """Number of classes; 1 without labels."""
    is_folder: bool
    """Whether the images are files in a folder, which are resized and cropped; those in shards have a fixed size."""
    latent_shape: tuple[int, int, int] | None
    """(C, H, W) of latents in shards; None for pixels."""
    is_gray: bool
    """Whether all images that were looked at are grayscale."""
    smallest: int
    """Shorter side of the smallest of these images."""
    largest: int
    """Longer side of the largest of these images."""
    unreadable: tuple[str, ...]
    """Why some of these images cannot be read, one sentence each."""
    looked_at: int
    """Number of these images."""
    unsupported: Mapping[str, int]
    """Number of files next to them in formats that are not read, by ending."""


def survey(path: str) -> Survey:
    """Look at up to `LOOKED_AT` images, evenly spaced.

    Args:
        path: a folder of images, or shards.

    Raises:
        DataError: there are no images, or none of them can be decoded.
    """
    if is_missing(path):
        raise DataError(f"{path} does not exist; expected a folder of images, or shards")
    source = open_source(path)
    latent_shape = _latent_shape(source)
    has_labels = source.labels[0] != NO_LABEL
    names = tuple(source.classes) if source.classes is not None and has_labels else None
    sides: list[tuple[int, int]] = []
    unreadable, is_gray = [], True
    chosen = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT if latent_shape is None else 0).astype(int))
    for index in chosen.tolist():
        try:
            image_HWC = _decoded(source, index)
        except DataError as error:
            unreadable.append(str(error))
            continue
        except Exception as error:  # decoders raise many types on damaged bytes
            unreadable.append(f"{source.describe(index)} cannot be decoded: {reason(error)}")
            continue
        sides.append(image_HWC.shape[:2])
        is_gray = is_gray and bool((image_HWC == image_HWC[..., :1]).all())
    if latent_shape is None and not sides:
        raise DataError(f"{path}: none of the images can be read; {unreadable[0]}")
    return Survey(
        num_images=len(source),
        class_names=names,
        num_classes=max(len(names or ()), int(source.labels.max()) + 1) if has_labels else 1,
        is_folder=expand_user(path).is_dir() and not isinstance(source, ShardDataset),
        latent_shape=latent_shape,
        is_gray=is_gray and latent_shape is None,
        smallest=min(map(min, sides), default=0),
        largest=max(map(max, sides), default=0),
        unreadable=tuple(unreadable),
        looked_at=len(chosen),
        unsupported=source.unsupported() if isinstance(source, ImageFolder) else {},
    )
