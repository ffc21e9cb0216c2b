"""Write safetensors files as a stream, with a checksum on the way.

The safetensors library writes tensors that are all in memory, and the file would have to be read again for its checksum
(see ``docs/decisions.md``).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.files import Digest

CHUNK_BYTES = 16 << 20
"""Bytes hashed and written, or read, at once."""
SYNC_BYTES = 256 << 20
"""Bytes after which the file is synced."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the supported types in a safetensors header."""


class Entry(NamedTuple):
    """One tensor of a file to write."""

    name: str
    """Key in the file."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype
    """One of `DTYPE_NAMES`."""
    pieces: Iterable[Tensor]
    """The flattened tensor in order, as CPU tensors of that type; iterated once, when it is written."""


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: dict[str, str], progress: Callable[[], object] = lambda: None
) -> Digest:
    """Write a safetensors file, holding at most one piece of one tensor in memory.

    Args:
        path: a new file.
        entries: the tensors.
        metadata: strings for the file's header.
        progress: called whenever more bytes are written, and more are on the disk.

    Returns:
        Size and checksum of the file, which is on the disk.

    Raises:
        OSError: the file exists or cannot be written.
    """
    header, size = _header(entries, metadata)
    with open(path, "xb", buffering=0) as file:
        writer = _HashingWriter(file, progress)
        writer.write(header)
        for entry in entries:
            for piece in entry.pieces:
                assert piece.dtype == entry.dtype, (entry.name, piece.dtype)
                writer.write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        assert writer.written == len(header) + size, "the pieces must have as many elements as the shapes"
        os.fsync(file.fileno())
    return Digest(writer.written, writer.sha256.hexdigest())


def _header(entries: Sequence[Entry], metadata: dict[str, str]) -> tuple[bytes, int]:
    """Return everything before the tensors' bytes, and how many bytes follow."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, shape, dtype, _ in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, offset


class _HashingWriter:
    """Writes to an unbuffered file and hashes what it writes."""

    def __init__(self, file: io.FileIO, progress: Callable[[], object]) -> None:
        self._file = file
        self._progress = progress
        self._synced = 0
        self.sha256 = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = memoryview(data)[start : start + CHUNK_BYTES]
            self.sha256.update(chunk)
            while chunk:  # a write may be short when the disk fills up; the next one raises
                done = self._file.write(chunk)
                self.written += done
                chunk = chunk[done:]
            if self.written - self._synced >= SYNC_BYTES:  # otherwise the last sync takes minutes without any progress
                os.fdatasync(self._file.fileno())
                self._synced = self.written
            self._progress()
