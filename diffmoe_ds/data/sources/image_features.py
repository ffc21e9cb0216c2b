"""Image features in shards: the spatial tokens of a frozen network, for REPA.

A sample's `.features` holds [2, T, F] in little-endian fp16, those of the image and of its mirror image; training reads
one of the two. The first member of every shard with image features, `__features__`, describes their format, so shards
can be moved and combined; WebDataset skips members with such names.

Legend: B images, T tokens of an image, a square grid in row-major order, F their width.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from diffmoe_ds.config.fields import MAX_GRID
from diffmoe_ds.data.sources.format_members import parse_member
from diffmoe_ds.text_layout import MAX_WIDTH

FEATURES_MEMBER = "__features__"
MAX_FEATURES_FORMAT_BYTES = 1 << 16
FEATURES_SUFFIX = "features"
FEATURES_COLUMNS = 2
"""Columns of the index of image features: offset and size in bytes of the member, both 0 for what a sample lacks."""
MAX_FEATURES_BYTES = 64 << 20
"""Most bytes of the features of an image and its mirror image."""
STORED = np.dtype("<f2")


@dataclass(frozen=True)
class FeatureFormat:
    """Shape and origin of image features; the same for all shards of a dataset."""

    side: int
    """Height and width of the grid of tokens: T = side x side."""
    width: int
    """Width F of a token, an even number."""
    name: str
    """The network, as `diffmoe prepare --features` got it."""
    sha256: str
    """SHA-256 of the network's weights and configuration."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (T, F)."""
        return self.side**2, self.width

    @property
    def half_bytes(self) -> int:
        """Return the bytes of the features of one of the two images."""
        return self.side**2 * self.width * STORED.itemsize

    def encode(self, features_2TF: np.ndarray) -> bytes:
        """Encode the features of an image and its mirror image as a member."""
        assert features_2TF.shape == (2, *self.shape), features_2TF.shape
        return np.ascontiguousarray(features_2TF, STORED).tobytes()

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Return uint8 [B, half_bytes] as fp16 [B, T, F], which shares its memory."""
        return stored.view(STORED).reshape(len(stored), *self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain data."""
        return asdict(self)


def feature_format(tree: Any) -> FeatureFormat:
    """Return the format that plain data describes, as `FeatureFormat.to_json` returns it.

    Raises:
        ValueError: it is invalid.
    """
    names = [field.name for field in fields(FeatureFormat)]
    if not isinstance(tree, dict) or any(name not in tree for name in names):
        raise ValueError("a key is missing")
    form = FeatureFormat(**{name: tree[name] for name in names})
    if not all(type(n) is int and 0 < n <= limit for n, limit in ((form.side, MAX_GRID), (form.width, MAX_WIDTH))):
        raise ValueError(f"side and width must be from 1 to {MAX_GRID} and {MAX_WIDTH}")
    if form.width % 2 or 2 * form.half_bytes > MAX_FEATURES_BYTES:
        raise ValueError(f"width must be even, and the features of an image have at most {MAX_FEATURES_BYTES:,} bytes")
    if not isinstance(form.name, str) or not isinstance(form.sha256, str):
        raise ValueError("name and sha256 must be strings")
    return form


def parse_feature_format(data: bytes, where: str) -> FeatureFormat:
    """Parse the `__features__` member of a shard.

    Args:
        data: its contents.
        where: the shard, for messages.

    Raises:
        DataError: it is invalid.
    """
    problem = f"{where} has an invalid {FEATURES_MEMBER}, which describes image features"
    return parse_member(data, feature_format, problem, "diffmoe prepare")


def feature_entry(members: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the row of a sample.

    Args:
        members: offset and size of each of its members, by suffix.
    """
    return members.get(FEATURES_SUFFIX, (0, 0))


def valid_features(rows: np.ndarray, form: FeatureFormat, shard_bytes: np.ndarray) -> np.ndarray:
    """Return for each row whether its numbers are within the shard, bool [n].

    Args:
        rows: int64 [n, 2].
        form: gives the size.
        shard_bytes: int64 [n], bytes of the shard of each row.
    """
    offset, size = rows.T
    within = (offset >= tarfile.BLOCKSIZE) & (offset <= shard_bytes - size)
    return np.asarray(within & (size == 2 * form.half_bytes))
