"""Open safetensors files of untrusted origin: the library accepts headers of 100 MB and waits for named pipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from diffmoe_ds.control_files import open_regular

MAX_HEADER_BYTES = 16 << 20
"""Most bytes of a header, which suffices for about 100,000 tensors."""


def open_safetensors(path: Path) -> Any:
    """Open a file after checking the size of its header.

    Returns:
        The file, as `safetensors.safe_open` returns it for torch.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: its header is too large.
        SafetensorError: its header is invalid; the library checks that the tensors fill the file without overlap.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size} bytes; expected from 1 to {MAX_HEADER_BYTES:,}")
    return safe_open(path, framework="pt")
