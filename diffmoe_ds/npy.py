"""Read and write .npy data where NumPy's own functions do not suffice.

When they read, they allocate whatever a header claims; when they write, they may miss that the disk is full.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

MAX_HEADER_BYTES = 10_000
"""NumPy's own limit of a header."""


class Header(NamedTuple):
    """Description of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool
    """Whether several dimensions are in Fortran order."""
    length: int
    """Bytes of the header; the array follows it."""

    @property
    def array_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def describe(self) -> str:
        """Return dtype and shape, for messages."""
        return f"{self.dtype} {list(self.shape)}"


def read_header(file: IO[bytes]) -> Header:
    """Read the header of an array and leave the file at the array's first byte.

    Args:
        file: seekable, at the start of the header.

    Raises:
        ValueError: it is invalid or describes pickled objects; the message continues a sentence that begins with the
            array.
    """
    start = file.tell()
    prefix = io.BytesIO(file.read(MAX_HEADER_BYTES))
    try:
        version = npy.read_magic(prefix)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(prefix)
    except Exception:  # NumPy evaluates the header as a Python literal, which may raise anything
        raise ValueError("has an invalid header") from None
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded")
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"has the shape {str(shape)[:80]}")
    file.seek(start + prefix.tell())
    return Header(tuple(shape), dtype, by_columns and len(shape) > 1, prefix.tell())


def read_array(file: IO[bytes], available: int) -> np.ndarray:
    """Read an array of which no more bytes are allocated than a file can hold.

    Args:
        file: seekable, at the start of the header.
        available: bytes from there to the end of the file, or the most that the caller accepts.

    Returns:
        The array, read-only.

    Raises:
        ValueError: as `read_header` raises it, or the array does not fit.
    """
    header = read_header(file)
    if header.array_bytes > available - header.length:
        raise ValueError(f"claims {header.describe()}, more than there is room for")
    data = file.read(header.array_bytes)
    if len(data) != header.array_bytes:
        raise ValueError("is truncated")
    return np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.by_columns else "C")


def write_array(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """Write the same bytes as `np.save`, holding one part of the array in memory at a time.

    `np.save` writes to a file through the C library and ignores its last error; this detects a full disk.

    Args:
        file: where to write.
        shape: of the whole array.
        dtype: of the array.
        parts: its rows, in order.

    Raises:
        OSError: the file cannot be written.
    """
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    written = 0
    for part in parts:
        assert part.shape[1:] == shape[1:] and part.dtype == dtype
        file.write(np.ascontiguousarray(part).data)
        written += len(part)
    assert written == shape[0], "the parts are the whole array"
