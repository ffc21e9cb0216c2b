"""What a prepared latent is: the posterior of a VAE for an image and for its mirror image.

A sample's ``.npy`` holds ``[2, 2, C, H, W]``: image and mirror image, then mean and log-variance, in fp16 or fp32.
Reading takes one half.  Every shard says in its first member, ``__latents__``, how its latents were made, so that
shards can be moved and mixed; WebDataset itself skips members of such names.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from diffmoe_ds.errors import DataError

FORMAT_MEMBER = "__latents__"
MAX_FORMAT_BYTES = 1 << 16
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class LatentFormat:
    """How the latents of a shard were made; the same for all shards of a set."""

    channels: int
    """Channels C of a latent."""
    size: int
    """Height and width of a latent."""
    image_size: int
    """Height and width of the pictures they were made from, in pixels."""
    dtype: str
    """``float16`` or ``float32``, little-endian."""
    scaling_factor: float
    """What a sampled latent is multiplied by, so that it has about unit variance."""
    shift_factor: float
    """What is subtracted from it before."""
    vae: str
    """Sha256 of the VAE's configuration and weights."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.channels, self.size, self.size

    @property
    def header(self) -> bytes:
        """What each member begins with, byte for byte."""
        buffer = io.BytesIO()
        description = {"descr": self._stored.str, "fortran_order": False, "shape": (2, 2, *self.shape)}
        np.lib.format.write_array_header_1_0(buffer, description)
        return buffer.getvalue()

    @property
    def half_bytes(self) -> int:
        """Bytes of mean and log-variance of one of the two images."""
        return 2 * self.channels * self.size**2 * self._stored.itemsize

    @property
    def member_bytes(self) -> int:
        """Bytes of a member."""
        return len(self.header) + 2 * self.half_bytes

    @property
    def _stored(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    def encode(self, moments: np.ndarray) -> bytes:
        """The member's bytes for ``[2, 2, C, H, W]``."""
        assert moments.shape == (2, 2, *self.shape), moments.shape
        return self.header + np.ascontiguousarray(moments, self._stored).tobytes()

    def decode(self, halves: np.ndarray) -> np.ndarray:
        """fp32 ``[B, 2, C, H, W]`` (mean, log-variance) of uint8 ``[B, half_bytes]``."""
        stored = torch.from_numpy(halves.view(self._stored).reshape(len(halves), 2, *self.shape))
        return stored.float().numpy()  # torch widens fp16 several times faster than NumPy, and exactly as well

    def sample(self, moments: np.ndarray, noise: np.ndarray, out: np.ndarray) -> None:
        """Scaled latents, fp32 ``[B, C, H, W]`` into ``out``, of moments ``[B, 2, C, H, W]`` and normal noise."""
        # NumPy and not torch: its exp gives an element the same bits wherever in the batch it stands.
        np.multiply(moments[:, 1], np.float32(0.5), out=out)
        np.exp(out, out=out)
        out *= noise
        out += moments[:, 0]
        if self.shift_factor:
            out -= np.float32(self.shift_factor)
        out *= np.float32(self.scaling_factor)

    def to_json(self) -> dict:
        """As plain data."""
        return asdict(self)


def parse_format(data: bytes, where: str) -> LatentFormat:
    """The format that a shard's ``__latents__`` states; raises ``DataError`` naming ``where``."""
    try:
        tree = json.loads(data)
        form = LatentFormat(**{field.name: tree[field.name] for field in fields(LatentFormat)})
        sizes = (form.channels, form.size, form.image_size)
        valid = all(isinstance(n, int) and 0 < n < 1 << 16 for n in sizes) and form.dtype in DTYPES
        valid = valid and bool(np.isfinite([form.scaling_factor, form.shift_factor]).all()) and form.scaling_factor > 0
    except (ValueError, TypeError, KeyError):
        valid = False
    if not valid:
        raise DataError(
            f"{where} has a {FORMAT_MEMBER} that is no description of latents: {data[:80]!r}; "
            "make the shards with diffmoe prepare latents"
        )
    return form
