"""Read small files that someone else may have written: manifests, indices, settings, recipes and the like.

Such a file is opened without blocking and must be a regular one, so that a named pipe or a device in its place is an
error instead of a hang. Size, nesting and numbers are bounded before anything is built from them, so a hostile file
costs little time and memory. Problems of the system are an `OSError` with a sentence as its ``strerror``; invalid
contents are a `ValueError`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MAX_BYTES = 16 << 20
"""Default limit of a file."""
MAX_TEXT_BYTES = 1 << 20
"""Limit of files that people write: DeepSpeed JSON and hostfiles."""
MAX_YAML_BYTES = 64 << 10
"""Limit of a recipe; the YAML parser takes about a second for it."""
MAX_INDEX_BYTES = 24 << 20
"""Limit of the index of a dataset, which suffices for 140,000 shards, and of the record of a shard."""
MAX_LINE_BYTES = 1 << 20
"""Limit of a line of a log file; a longer one is skipped."""
MAX_SKIPPED_BYTES = 64 << 20
"""Limit of a line that is skipped; one that is even longer ends the file."""
MAX_DEPTH = 32
"""Deepest nesting of objects and lists."""
MAX_NODES = 1 << 19
"""Most objects and lists in a JSON file."""
MAX_VALUES = 600_000
"""Most values in a JSON file, with commas in strings; the index of 140,000 shards has 560,000."""
INT_RANGE = range(-(2**63), 2**64)
"""Integers that a file may hold."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading without blocking.

    Args:
        path: the file; links are followed.

    Raises:
        OSError: it cannot be opened, or is a directory, a named pipe, a socket or a device.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: str | os.PathLike[str]) -> int:
    """Return the descriptor of a file, as `open_regular` does; the caller closes it.

    Raises:
        OSError: see `open_regular`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a null byte, or characters that the file system's encoding lacks
        raise OSError(errno.EINVAL, "invalid file name", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """Return the contents of a file.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than the limit of {limit:,} bytes", str(path))
    return data


def read_text(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """Return the contents of a UTF-8 file.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Any:
    """Return the contents of a JSON file.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        OSError: see `read_bytes`.
        ValueError: see `parse_json`.
    """
    return parse_json(read_text(path, limit))


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON whose nesting, number of values and numbers are bounded.

    Args:
        text: the JSON.
        pairs: builds an object from its keys and values; None builds a `dict`.

    Raises:
        ValueError: it is not JSON, is nested deeper than `MAX_DEPTH`, holds more than `MAX_NODES` objects and lists or
            `MAX_VALUES` values, or a number that is not finite or, if it is an integer, not of 64 bits.
    """
    if text.count("{") + text.count("[") > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} objects and lists")
    if text.count(",") >= MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    integer = _integer if re.search("[0-9]{19}", text) else None  # Python's own is several times faster
    try:
        tree = json.loads(
            text, parse_int=integer, parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=pairs
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    _check_depth(tree)
    return tree


def parse_json_line(line: str) -> Any:
    """Parse a line of a JSON Lines file.

    Raises:
        ValueError: see `parse_json`; the message gives the column, but not the line, which the caller knows.
    """
    try:
        return parse_json(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None


def read_lines(path: str | os.PathLike[str], limit: int = MAX_LINE_BYTES) -> Iterator[str]:
    """Yield the lines of a UTF-8 log file of any size, without their line breaks; invalid bytes are replaced.

    Args:
        path: the file.
        limit: most bytes of a line.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        while line := file.readline(limit):
            if len(line) < limit or line.endswith(b"\n"):
                yield line.decode("utf-8", "replace").rstrip("\r\n")
                continue
            end = file.tell() + MAX_SKIPPED_BYTES
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
                if file.tell() > end:
                    return


def _integer(text: str) -> int:
    if len(text) > 20 or (value := int(text)) not in INT_RANGE:
        raise ValueError(f"{text[:24]}{'...' * (len(text) > 24)} is not a 64-bit integer")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:24]} is not a finite number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
