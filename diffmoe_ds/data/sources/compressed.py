"""Decompress shards, within bounds."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from typing import BinaryIO

from diffmoe_ds.errors import DataError

CHUNK = 1 << 20
MAX_RATIO = 200
"""Largest compression ratio of a large shard; zeros reach 1,000, shards of raw pixels 10."""
MAX_UNCHECKED_BYTES = 64 << 20
"""A shard up to this size may have any compression ratio."""


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
