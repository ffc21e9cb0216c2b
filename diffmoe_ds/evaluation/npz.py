"""Read arrays from untrusted .npz files: headers first, a few rows at a time, without unpickling.

`numpy.load` allocates whatever a header claims. Here shapes and sizes are checked before anything is allocated.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from diffmoe_ds.control_files import open_descriptor
from diffmoe_ds.errors import DataError
from diffmoe_ds.npy import Header, read_header

MAX_RATIO = 200
"""Maximum compression ratio of a large array; zeros reach 1,000, images rarely 5."""
MAX_DIRECTORY_BYTES = 1 << 20
"""Maximum size of an archive's list of members, which `zipfile` reads as a whole; thousands of arrays."""
MAX_UNCHECKED_BYTES = 64 << 20
"""Arrays up to this size may have any compression ratio."""
DAMAGED = (
    OSError, EOFError, ValueError, RuntimeError, NotImplementedError, OverflowError, KeyError, IndexError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions of zipfile, zlib and numpy for damaged or encrypted files."""


class _BoundedReader(io.BufferedReader):
    """A file that refuses to read many bytes at once, until the list of members has been read."""

    is_bounded = True

    def read(self, size: int | None = -1, /) -> bytes:
        if not self.is_bounded:
            return super().read(size)
        wanted = MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY_BYTES + 1 or len(data := super().read(wanted)) > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its list of members has more than {MAX_DIRECTORY_BYTES >> 20} MiB")
        return data


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the zip archive in a regular file, whose list of members is bounded.

    Raises:
        ValueError: the list is too long.
        OSError: the file cannot be read, or is not a regular file.
    """
    with _BoundedReader(io.FileIO(open_descriptor(path))) as file, zipfile.ZipFile(file) as archive:
        file.is_bounded = False
        yield archive


class NpzReader:
    """The arrays of an .npz file."""

    def __init__(self, path: Path) -> None:
        """Read the list of arrays.

        Args:
            path: a file written by ``numpy.savez`` or ``savez_compressed``.

        Raises:
            DataError: it cannot be read.
        """
        self.path = path
        with self._refusing_damage(), _archive(path) as archive:
            self._size = path.stat().st_size
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._members)

    def header(self, name: str) -> Header:
        """Return the shape and type of an array, after checking that the file can hold it.

        Raises:
            DataError: the array is damaged or pickled, or its compression ratio is too high.
        """
        with self._open(name) as (header, _):
            return header

    def rows(self, name: str, start: int, stop: int, together: int) -> Iterator[np.ndarray]:
        """Yield rows of an array in parts.

        Args:
            name: the array.
            start: first row.
            stop: one past the last row.
            together: rows per part; the last part may have fewer.

        Raises:
            DataError: the array is damaged.
        """
        with self._open(name) as (header, file):
            row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
            file.seek(start * row_bytes, 1)
            for first in range(start, stop, together):
                count = min(together, stop - first)
                data = file.read(count * row_bytes)
                if len(data) != count * row_bytes:
                    raise DataError(f"{self.path}: array {name!r} is truncated.")
                yield np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])

    def array(self, name: str, max_bytes: int) -> np.ndarray:
        """Return an entire array.

        Raises:
            DataError: it is damaged or larger than `max_bytes`.
        """
        with self._open(name) as (header, file):
            size = header.array_bytes
            if size > max_bytes:
                raise DataError(f"{self.path}: array {name!r} of {header.describe()} is larger than expected.")
            data = file.read(size)
            if len(data) != size:
                raise DataError(f"{self.path}: array {name!r} is truncated.")
            return np.frombuffer(data, header.dtype).reshape(header.shape)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
        """Provide the header of an array and a file at its first byte."""
        if name not in self._members:
            raise DataError(f"{self.path}: has no array {name!r}; it holds {', '.join(self.names[:8]) or 'none'}.")
        info = self._members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others decompress without a bound
            raise DataError(f"{self.path}: array {name!r} is not compressed as numpy.savez_compressed does.")
        stored = info.compress_type == zipfile.ZIP_STORED
        claims_more = info.compress_size > self._size or (stored and info.file_size != info.compress_size)
        ratio = info.file_size / max(1, info.compress_size)
        if claims_more or (info.file_size > MAX_UNCHECKED_BYTES and ratio > MAX_RATIO):
            raise DataError(
                f"{self.path}: array {name!r} claims {info.file_size / 1e9:.3g} GB in a file of "
                f"{self._size / 1e9:.3g} GB; refused as a decompression bomb."
            )
        with self._refusing_damage(), _archive(self.path) as archive, archive.open(info) as file:
            try:
                header = read_header(file)
            except ValueError as error:
                raise DataError(f"{self.path}: array {name!r} {error}.") from None
            if header.by_columns:
                raise DataError(
                    f"{self.path}: array {name!r} is in Fortran order; save it with numpy.ascontiguousarray."
                )
            if header.array_bytes != info.file_size - header.length:
                raise DataError(
                    f"{self.path}: array {name!r} claims {header.describe()}, {header.array_bytes} bytes, but holds "
                    f"{info.file_size - header.length}."
                )
            yield header, file

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{self.path}: does not exist.") from None
        except DAMAGED as error:
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise DataError(f"{self.path}: is not a complete .npz file: {reason}.") from None
