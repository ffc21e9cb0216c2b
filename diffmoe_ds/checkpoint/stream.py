"""Files that are written once, checked for ever: safetensors as a stream, checksums, fsync.

The safetensors library writes a file from tensors that are all in memory and tells nothing of its bytes; here the
tensors come one piece after the other and are hashed on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.files import Digest

CHUNK_BYTES = 16 << 20
"""Bytes written at once."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Entry(NamedTuple):
    """One tensor of a file to write."""

    name: str
    """Its key."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: torch.dtype
    """Its type, one of `DTYPE_NAMES`."""
    pieces: Iterable[Tensor]
    """Its elements in order, as CPU tensors of that type; asked for when their turn has come."""


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Digest:
    """Write a safetensors file, holding no more in memory than one piece.

    Args:
        path: must not exist.
        entries: the tensors.
        metadata: goes into the file's header.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, shape, dtype, _ in entries:
        numel = torch.Size(shape).numel()
        size = numel * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    hasher, written = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal written
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = memoryview(data)[start : start + CHUNK_BYTES]
                hasher.update(chunk)
                while chunk:  # a write may be short when the disk fills; the next one raises
                    done = file.write(chunk)
                    written += done
                    chunk = chunk[done:]

        put(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.pieces:
                assert piece.dtype == entry.dtype, (entry.name, piece.dtype)
                put(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))
        assert written == 8 + len(text) + offset, "the pieces must be as many elements as the shape"
        os.fsync(file.fileno())
    return Digest(written, hasher.hexdigest())
