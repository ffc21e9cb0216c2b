"""Decompress shards, within bounds, and store what is read from them again and again."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from diffmoe_ds.errors import DataError

CHUNK = 1 << 20
MAX_RATIO = 200
"""Largest compression ratio of a large shard; zeros reach 1,000, shards of raw pixels 10."""
MAX_UNCHECKED_BYTES = 64 << 20
"""A shard up to this size may have any compression ratio."""
MAX_UNPACKED_BYTES = 4 << 30
"""Most bytes of a shard that is decompressed in memory."""


def decompress(shard: str, file: BinaryIO) -> Iterator[bytes]:
    """Yield the contents of a gzip file.

    Args:
        shard: its name, for messages.
        file: the compressed file.

    Raises:
        DataError: its compression ratio is too high.
        OSError, EOFError, zlib.error: it is damaged.
    """
    limit = max(MAX_UNCHECKED_BYTES, MAX_RATIO * os.fstat(file.fileno()).st_size)
    total = 0
    with gzip.open(file) as stream:
        while chunk := stream.read(CHUNK):
            total += len(chunk)
            if total > limit:
                raise DataError(
                    f"shard {shard} is more than {MAX_RATIO} times as large when decompressed; refused as a "
                    "decompression bomb"
                )
            yield chunk


def unpack(shard: str, file: BinaryIO) -> bytes:
    """Return the contents of a gzip file.

    Args:
        shard: its name, for messages.
        file: the compressed file.

    Raises:
        DataError: they are larger than `MAX_UNPACKED_BYTES`, or the compression ratio is too high.
        OSError, EOFError, zlib.error: the file is damaged.
    """
    unpacked = io.BytesIO()
    for chunk in decompress(shard, file):
        unpacked.write(chunk)
        if unpacked.tell() > MAX_UNPACKED_BYTES:
            raise DataError(
                f"shard {shard} needs more than {MAX_UNPACKED_BYTES >> 20} MiB of memory when decompressed; "
                "store it as a plain .tar, which is read in place"
            )
    return unpacked.getvalue()


class StoredBytes:
    """Bytes in an unnamed temporary file, or in memory if the file cannot be written.

    The kernel can drop the pages of a file when memory is scarce. Forked processes share the file, which disappears
    with the last of them.
    """

    def __init__(self, data: bytes) -> None:
        """Store the bytes."""
        self._data: bytes | None = data
        with contextlib.suppress(OSError), contextlib.ExitStack() as on_error:  # a full or read-only disk, for example
            file = on_error.enter_context(tempfile.TemporaryFile(buffering=0))
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            on_error.pop_all()
            self._file, self._data = file, None

    def read(self, offset: int, buffers: Sequence[Any]) -> None:
        """Fill buffers with the bytes from an offset on.

        Raises:
            OSError: the file cannot be read.
        """
        if self._data is None:
            if os.preadv(self._file.fileno(), buffers, offset) != sum(map(len, buffers)):
                raise OSError(errno.EIO, "The temporary file is truncated")
            return
        for buffer in buffers:
            buffer[:] = memoryview(self._data)[offset : offset + len(buffer)]
            offset += len(buffer)

    def __reduce__(self) -> tuple[type[StoredBytes], tuple[bytes]]:
        data = self._data
        if data is None:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as file:
                data = file[:]
        return StoredBytes, (data,)
