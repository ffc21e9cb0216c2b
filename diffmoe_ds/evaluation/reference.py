"""References: images, or statistics in ADM's .npz layout (``mu, sigma``, for sFID ``mu_s, sigma_s``).

Files written by `save_reference` also hold the extractor's name, the number and size of the images and, for up to
50,000 images, their features. ADM's own files do not name an extractor: their statistics are Inception's.
Legend: N images, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation.extractors import Extractor
from diffmoe_ds.evaluation.images import Images, NpzImages, check_count, check_size, open_images
from diffmoe_ds.evaluation.metrics import factor
from diffmoe_ds.evaluation.npz import NpzReader
from diffmoe_ds.files import atomic_write, expand_user

MAX_FEATURES = 16_384
"""Largest F of statistics; the covariance then takes 2 GB."""
MAX_COUNT = 10**12
"""Images behind statistics."""
SAVED_FEATURES = 50_000
"""Largest number of images whose features are saved."""
INDEFINITE = 1e-3
"""Part of a covariance's trace that its factorization may miss; fp32 rounding causes about 1e-6."""


class Gaussian(NamedTuple):
    """Mean and covariance of a set of features."""

    mean_F: Tensor
    """fp64 [F]."""
    covariance_FF: Tensor
    """fp64 [F, F]."""


class Reference(NamedTuple):
    """The reference for the evaluated images."""

    path: str
    pooled: Gaussian | None = None
    """Statistics of the features; None if they must be computed from the images."""
    spatial: Gaussian | None = None
    """Statistics of the features of sFID."""
    images: Images | None = None
    """The images, for KID, precision and recall, and for missing statistics."""
    num_images: int | None = None
    """Number of images behind the statistics, if known."""
    features: NpzReader | None = None
    """A file with the features of all images, in place of the images."""

    def saved_features(self, start: int, stop: int) -> Tensor:
        """Return the saved features of images from `start` up to `stop`, fp32 [N, F].

        Raises:
            DataError: the file is damaged, or a feature is non-finite.
        """
        assert self.features is not None
        width = self.features.header("features").shape[1]
        parts = [torch.empty(0, width)]  # a rank may have no share of few images
        parts += [torch.from_numpy(rows.copy()) for rows in self.features.rows("features", start, stop, 1024)]
        features_NF = torch.cat(parts)
        if not features_NF.isfinite().all():
            raise DataError(f"{self.path}: features contains NaN or Inf.")
        return features_NF


def open_reference(path: str, extractor: Extractor, size: tuple[int, int]) -> Reference:
    """Open a reference.

    Args:
        path: an .npz file with images or statistics, a folder of images, or shards.
        extractor: computes the features of the evaluated images.
        size: height and width of the evaluated images.

    Raises:
        DataError: it cannot be read, or its statistics are from a different extractor or image size.
    """
    if not path.endswith(".npz"):
        return Reference(path, images=open_images(path, size, "--reference"))
    reader = NpzReader(expand_user(path))
    if "mu" not in reader:
        return Reference(path, images=open_images(path, size, "--reference"))
    images = NpzImages(reader) if "arr_0" in reader else None
    if "extractor" not in reader and not extractor.is_inception and images is not None:
        check_size(path, images.size, size)
        return Reference(path, images=images)
    _check_extractor(reader, extractor)
    if images is not None:
        check_size(path, images.size, size)
    if "image_size" in reader:
        height, width = _small(reader, "image_size", (2,))
        check_size(path, (height, width), size)
    outputs = extractor.extract(torch.zeros(1, 3, *size, dtype=torch.uint8))
    _check_width(reader, "mu", outputs.features_BF, extractor.name)
    pooled = read_gaussian(reader, "mu", "sigma")
    spatial = None
    if "mu_s" in reader and outputs.spatial_BS is not None:
        _check_width(reader, "mu_s", outputs.spatial_BS, f"{extractor.name} (sFID)")
        spatial = read_gaussian(reader, "mu_s", "sigma_s")
    count = None
    if "n" in reader:
        (count,) = _small(reader, "n", (1,))
        check_count(count, path)
        if count > MAX_COUNT:
            raise DataError(f"{path}: n must be at most {MAX_COUNT:,}, got {count}.")
    features = reader if images is None and "features" in reader else None
    if features is not None:
        header = reader.header("features")
        if header.dtype != np.float32 or header.shape != (count, len(pooled.mean_F)):
            raise DataError(f"{path}: features is {header.describe()}; expected float32 {[count, len(pooled.mean_F)]}.")
    return Reference(path, pooled, spatial, images, count, features)


def read_gaussian(reader: NpzReader, mean: str, covariance: str) -> Gaussian:
    """Read statistics.

    Args:
        reader: the file.
        mean: name of the mean, [F].
        covariance: name of the covariance, [F, F].

    Raises:
        DataError: they are missing, not floats of these shapes, non-finite, or not a covariance.
    """
    headers = reader.header(mean), reader.header(covariance)
    mu, sigma = headers
    size = mu.shape[0] if len(mu.shape) == 1 else 0
    if not (0 < size <= MAX_FEATURES and sigma.shape == (size, size)) or any(h.dtype.kind != "f" for h in headers):
        raise DataError(
            f"{reader.path}: {mean} is {mu.describe()} and {covariance} {sigma.describe()}; expected floats [F] and "
            f"[F, F], F at most {MAX_FEATURES}."
        )
    limit = 8 * MAX_FEATURES**2
    mean_F, covariance_FF = (
        torch.from_numpy(reader.array(name, limit).astype(np.float64)) for name in (mean, covariance)
    )
    if not (mean_F.isfinite().all() and covariance_FF.isfinite().all()):
        raise DataError(f"{reader.path}: {mean} or {covariance} contains NaN or Inf.")
    scale = float(covariance_FF.diagonal().abs().max())
    trace = float(covariance_FF.trace())
    asymmetry = float((covariance_FF - covariance_FF.T).abs().max())
    missing = abs(trace - float(factor(covariance_FF).square().sum()))
    if asymmetry > INDEFINITE * scale or missing > INDEFINITE * trace or covariance_FF.diagonal().min() < 0:
        raise DataError(f"{reader.path}: {covariance} is not a covariance: not symmetric and positive semidefinite.")
    return Gaussian(mean_F, (covariance_FF + covariance_FF.T) / 2)


def save_reference(
    path: Path,
    extractor: str,
    size: tuple[int, int],
    pooled: Gaussian,
    spatial: Gaussian | None,
    count: int,
    features_NF: Tensor | None,
) -> None:
    """Write a reference's statistics, atomically.

    Args:
        path: the file, ending in .npz.
        extractor: name of the extractor.
        size: height and width of the images.
        pooled: statistics of the features.
        spatial: statistics of the features of sFID, if the extractor has them.
        count: N.
        features_NF: fp32 features of all images, to be saved as well; None omits them.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {
        "mu": pooled.mean_F.numpy(),
        "sigma": pooled.covariance_FF.numpy(),
        "extractor": np.array(extractor),
        "n": np.array([count]),
        "image_size": np.array(size),
    }
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_F.numpy(), "sigma_s": spatial.covariance_FF.numpy()}
    if features_NF is not None:
        arrays["features"] = features_NF.numpy()
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _check_width(reader: NpzReader, mean: str, features_BF: Tensor, name: str) -> None:
    """Check the number of features before the covariance is read and factorized, which takes minutes for many."""
    found, expected = reader.header(mean).shape, features_BF.shape[1]
    if len(found) == 1 and found[0] != expected:
        raise DataError(f"{reader.path}: has statistics of {found[0]} features, but {name} has {expected}.")


def _check_extractor(reader: NpzReader, extractor: Extractor) -> None:
    """Check that statistics come from the extractor; those that name no extractor are Inception's."""
    if "extractor" not in reader:
        if not extractor.is_inception:
            raise DataError(
                f"{reader.path}: its statistics name no extractor, so they are Inception's, but --extractor is "
                f"{extractor.name}; use --extractor inception:WEIGHTS_FILE, or a reference with images."
            )
        return
    header = reader.header("extractor")
    try:
        is_text = header.dtype.kind == "U" and not header.shape
        found = str(reader.array("extractor", 4096).item()) if is_text else "unknown"
    except (ValueError, SystemError):  # not Unicode, by a little or by far
        found = "unknown"
    if found != extractor.name:
        shown = found[:80] if found.isprintable() else "unknown"
        raise DataError(
            f"{reader.path}: its statistics are from {shown}, but --extractor is {extractor.name}; use the same "
            "extractor, or a reference with images."
        )


def _small(reader: NpzReader, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a small int64 array as a tuple."""
    header = reader.header(name)
    if header.dtype != np.int64 or header.shape != shape:
        raise DataError(f"{reader.path}: {name} is {header.describe()}; expected int64 {list(shape)}.")
    return tuple(reader.array(name, 64).tolist())
