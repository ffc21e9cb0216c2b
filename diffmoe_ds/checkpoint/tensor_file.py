"""Read safetensors files by offset.

The safetensors library maps a file for as long as it is open: its disk space is not freed when it is removed, and a
disk error is a SIGBUS. Here, ``preadv`` reads what is needed, and every error is a `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.stream import CHUNK_BYTES, DTYPE_NAMES
from diffmoe_ds.control_files import open_descriptor, parse_json
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Progress

MAX_HEADER_BYTES = 16 << 20
"""Largest header that is read; those of 10^5 tensors fit."""
MAX_DIMENSIONS = 8
"""Most dimensions of a tensor."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""The supported types by their name in a header."""
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Bytes of an element of each."""


class Stored(NamedTuple):
    """A tensor in a file, as the header describes it."""

    dtype: str
    """Its type, such as ``F32``; need not be one of `DTYPES`."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int
    """Its first byte in the file."""
    end: int
    """The byte after its last one."""


class TensorFile:
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open a file; nothing is read yet.

        Args:
            path: the file.

        Raises:
            CheckpointError: it cannot be opened or is not a regular file.
        """
        self.path = path
        try:
            self._file = io.FileIO(open_descriptor(path))
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._error(error.strerror) from None

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a file that was only read, nothing can be lost
            self._file.close()

    def header(self) -> dict[str, Stored]:
        """Read which tensors the file holds, by name.

        Raises:
            CheckpointError: the header is damaged or does not match the file's size.
        """
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(MAX_HEADER_BYTES, self._size - 8):
            raise self._error(f"its header has {length:,} bytes, of a file of {self._size:,} bytes")
        try:
            tree = parse_json(self._read(8, length).decode())
            tree.pop("__metadata__", None)
            found = {name: _stored(entry, 8 + length) for name, entry in tree.items()}
            end = 8 + length
            for stored, name in sorted((stored[2:], name) for name, stored in found.items()):
                if stored[0] != end:  # also if a name occurs twice
                    raise ValueError(f"{name!r} overlaps another tensor, or leaves a gap")
                end = stored[1]
            if end != self._size:
                raise ValueError(f"it describes {end - 8 - length:,} bytes, but {self._size - 8 - length:,} follow")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"its header is damaged: {error}") from None
        return found

    def read(self, offset: int, out: Tensor, progress: Progress = lambda: None) -> None:
        """Fill a contiguous CPU tensor with bytes of the file.

        Args:
            offset: the first byte.
            out: of the type that is stored.
            progress: called whenever more bytes are read.

        Raises:
            CheckpointError: they cannot be read.
        """
        self._read_into(offset, memoryview(out.view(torch.uint8).numpy()), progress)  # type: ignore[arg-type]

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._read_into(offset, memoryview(data))
        return bytes(data)

    def _read_into(self, offset: int, out: memoryview, progress: Progress = lambda: None) -> None:
        while out:
            try:
                done = os.preadv(self._file.fileno(), [out[:CHUNK_BYTES]], offset)
            except OSError as error:
                raise self._error(error.strerror) from None
            if not done:
                raise self._error("it is truncated")
            out, offset = out[done:], offset + done
            progress()

    def _error(self, reason: str | None) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be read: {reason}.")


def _stored(entry: Any, first_byte: int) -> Stored:
    """Return the description of a tensor in a header.

    Args:
        entry: the description in JSON.
        first_byte: of all tensors, in the file.

    Raises:
        ValueError: the description contradicts itself.
        KeyError: it is incomplete; as TypeError and AttributeError, raised for JSON of another structure.
    """
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    valid = type(dtype) is str and len(shape) <= MAX_DIMENSIONS
    for number in (*shape, first, last):
        valid = valid and type(number) is int and number >= 0
    if not valid or first > last or (dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != last - first):
        raise ValueError(f"it describes a tensor as {str(entry)[:80]}")
    return Stored(dtype, shape, first_byte + first, first_byte + last)
