"""Read safetensors files by offset.

The safetensors library maps a file for as long as it is open: its disk space is not freed when it is removed, and a
disk error is a SIGBUS. Here, ``preadv`` reads what is needed, and every error is a `CheckpointError`.
"""

from __future__ import annotations

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


class Stored(NamedTuple):
    """A tensor in a file, as the header describes it."""

    dtype: str
    """Its type, such as ``F32``; need not be one of `DTYPES`."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int
    """Its first byte in the file."""


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
        except OSError as error:
            raise self._error(error.strerror) from None
        self._size = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
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
            found = {name: _stored(entry) for name, entry in tree.items() if name != "__metadata__"}
            end = 0
            for name, (first, last, stored) in sorted(found.items(), key=lambda item: item[1][:2]):
                if first != end:  # also if a name occurs twice
                    raise ValueError(f"{name!r} overlaps another tensor, or leaves a gap")
                end = last
                found[name] = first, last, stored._replace(offset=8 + length + first)
            if end != self._size - 8 - length:
                raise ValueError(f"it describes {end:,} bytes, but {self._size - 8 - length:,} follow")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"its header is damaged: {error}") from None
        return {name: stored for name, (_, _, stored) in found.items()}

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


def _stored(entry: Any) -> tuple[int, int, Stored]:
    """Return first and last byte of a tensor among the tensors' bytes, and its description without the offset.

    Raises:
        ValueError: the description contradicts itself.
        KeyError: it is incomplete; as TypeError and AttributeError, raised for JSON of another structure.
    """
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, first, last)
    if type(dtype) is not str or len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"it describes a tensor as {str(entry)[:80]}")
    if first > last or (dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != last - first):
        raise ValueError(f"it describes a tensor as {str(entry)[:80]}")
    return first, last, Stored(dtype, shape, 0)
