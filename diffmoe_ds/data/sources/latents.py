"""The format of prepared latents: a VAE's posterior for an image and for its mirror image.

A sample's `.npy` holds [2, 2, C, H, W] in fp16 or fp32: image and mirror image, then mean and log-variance.  Training
reads one of the two images.  The first member of every shard, `__latents__`, describes the format, so shards can be
moved and combined; WebDataset skips members with such names.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from diffmoe_ds.control_files import parse_json
from diffmoe_ds.errors import DataError
from diffmoe_ds.npy import read_array

FORMAT_MEMBER = "__latents__"
MAX_FORMAT_BYTES = 1 << 16
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class LatentFormat:
    """Shape, precision and scaling of latents; the same for all shards of a dataset."""

    channels: int
    """Channels C of a latent."""
    size: int
    """Height and width of a latent."""
    image_size: int
    """Height and width of the encoded images, in pixels."""
    dtype: str
    """`float16` or `float32`, little-endian."""
    scaling_factor: float
    """Factor that gives sampled latents about unit variance."""
    shift_factor: float
    """Subtracted before scaling."""
    vae: str
    """SHA-256 of the VAE's configuration and weights."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of one latent."""
        return self.channels, self.size, self.size

    @property
    def header(self) -> bytes:
        """Return the first bytes of every member, the .npy header."""
        buffer = io.BytesIO()
        description = {"descr": self._stored.str, "fortran_order": False, "shape": (2, 2, *self.shape)}
        np.lib.format.write_array_header_1_0(buffer, description)
        return buffer.getvalue()

    @property
    def half_bytes(self) -> int:
        """Return the bytes of mean and log-variance of one of the two images."""
        return 2 * self.channels * self.size**2 * self._stored.itemsize

    @property
    def member_bytes(self) -> int:
        """Return the bytes of a member."""
        return len(self.header) + 2 * self.half_bytes

    @property
    def _stored(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    def encode(self, moments: np.ndarray) -> bytes:
        """Encode [2, 2, C, H, W] as a member."""
        assert moments.shape == (2, 2, *self.shape), moments.shape
        return self.header + np.ascontiguousarray(moments, self._stored).tobytes()

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Decode uint8 [B, half_bytes] to moments, fp32 [B, 2, C, H, W]: mean and log-variance."""
        moments = torch.from_numpy(stored.view(self._stored).reshape(len(stored), 2, *self.shape))
        return moments.float().numpy()  # torch converts fp16 several times faster than NumPy, and exactly

    def sample(self, moments: np.ndarray, noise: np.ndarray, out: np.ndarray) -> None:
        """Write scaled latents, fp32 [B, C, H, W], to `out`, from moments [B, 2, C, H, W] and standard normal noise."""
        # NumPy, not torch: its exp gives the same bits at every place in a batch.
        np.multiply(moments[:, 1], np.float32(0.5), out=out)
        np.exp(out, out=out)
        out *= noise
        out += moments[:, 0]
        if self.shift_factor:
            out -= np.float32(self.shift_factor)
        out *= np.float32(self.scaling_factor)

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain data."""
        return asdict(self)


def parse_format(data: bytes, where: str) -> LatentFormat:
    """Parse the `__latents__` member of a shard.

    Args:
        data: its contents.
        where: the shard, for messages.

    Raises:
        DataError: it is invalid.
    """
    try:
        form = latent_format(parse_json(data.decode()))
    except ValueError:
        raise DataError(
            f"{where} has an invalid {FORMAT_MEMBER}, which describes latents: {data[:80]!r}; "
            "regenerate the shards with diffmoe prepare latents"
        ) from None
    return form


def latent_format(tree: Any) -> LatentFormat:
    """Return the format that plain data describes, as `LatentFormat.to_json` returns it.

    Raises:
        ValueError: it is invalid.
    """
    if not isinstance(tree, dict) or any(field.name not in tree for field in fields(LatentFormat)):
        raise ValueError("a key is missing")
    form = LatentFormat(**{field.name: tree[field.name] for field in fields(LatentFormat)})
    sizes = (form.channels, form.size, form.image_size)
    factors = (form.scaling_factor, form.shift_factor)
    valid = all(type(n) is int and 0 < n < 1 << 16 for n in sizes) and isinstance(form.vae, str)
    valid = valid and isinstance(form.dtype, str) and form.dtype in DTYPES
    valid = valid and all(type(factor) in (int, float) for factor in factors) and form.scaling_factor > 0
    if not valid:
        raise ValueError("a value is invalid")
    return form


def decode_array(data: bytes) -> np.ndarray:
    """Decode a latent that is stored as a single array to float32 [C, H, W].

    Raises:
        ValueError: it is not one, or contains NaN or Inf.
    """
    latent = read_array(io.BytesIO(data), len(data))
    with np.errstate(over="ignore"):  # values outside float32 become infinite and are refused
        values = np.ascontiguousarray(latent, np.float32) if latent.dtype.kind == "f" else None
    if values is None or values.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(f"{latent.dtype} array of shape {latent.shape}, expected finite floats of shape (C, H, W)")
    return values
