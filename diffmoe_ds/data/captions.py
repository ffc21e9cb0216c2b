"""Captions of a dataset: next to its images, in its shards, or in a table (CSV or JSONL).

A row of a table names its image in one of `IMAGE_KEYS`, by path relative to the folder, by key, or by base name, each
with or without suffix; for shards, also by the file that preparation made the image from. It has one or more captions
in one of `CAPTION_KEYS`. Several rows may name the same image.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from diffmoe_ds.control_files import MAX_LINE_BYTES, open_regular, parse_json_line, read_bytes
from diffmoe_ds.data.sources.folder import ImageFolder, Source, file_key, is_image
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.text_index import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    MAX_CAPTIONS_BYTES,
    clean_captions,
    parse_captions,
)
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.files import expand_user
from diffmoe_ds.text import counted, reason

IMAGE_KEYS = ("file_name", "file", "image", "key", "path")
"""Columns that name the image of a row; the first one that is present counts."""
MAX_TABLE_BYTES = 4 << 30
"""Most bytes of a table, which is held in memory."""


class Captions(Protocol):
    """The captions of a source's images."""

    def captions(self, index: int) -> list[str]:
        """Return the captions of an image, at least one, each on one line.

        Raises:
            DataError: it has none, or they cannot be read.
        """


def open_captions(source: Source, path: str | None = None) -> Captions:
    """Return the captions of a source's images.

    Args:
        source: a folder or shards.
        path: a table of captions (`.csv` or `.jsonl`). None reads files next to the images of a folder, and members
            of shards: `.txt`, with a caption per line, or `.json`.

    Raises:
        ConfigError: the table is neither CSV nor JSONL.
        DataError: the table cannot be read.
    """
    return _Beside(source) if path is None else _Table(source, expand_user(path))


def captions_beside(source: Source, index: int) -> list[str]:
    """Return the captions in a `.txt` or `.json` next to an image, in its folder or shard; none if it has none.

    Raises:
        DataError: they cannot be read.
    """
    if isinstance(source, ShardDataset):
        return _one_line(source.captions(index))
    assert isinstance(source, ImageFolder), type(source)
    for suffix in CAPTION_SUFFIXES:
        path = source.path(index).with_suffix(f".{suffix}")
        try:
            found = parse_captions(suffix, read_bytes(path, MAX_CAPTIONS_BYTES))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"the captions {path} cannot be read: {reason(error)}") from None
        if found:
            return _one_line(found)
    return []


class _Beside:
    """Captions next to the images."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def captions(self, index: int) -> list[str]:
        """See `Captions`."""
        return _required(captions_beside(self._source, index), self._source.describe(index), self._expected(index))

    def _expected(self, index: int) -> str:
        """Return where the captions of an image were expected."""
        if not isinstance(self._source, ImageFolder):
            return "a .txt or .json member next to the image"
        files = [self._source.path(index).with_suffix(f".{suffix}") for suffix in CAPTION_SUFFIXES]
        return next((f"one in {file}" for file in files if file.exists()), f"{files[0]} or .json")


class _Table:
    """Captions in a CSV or JSONL file."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self._path = path
        self._rows = read_table(path)
        # A table usually names files, but images in shards have keys.
        self._by_key = _by_key(self._rows) if isinstance(source, ShardDataset) else {}

    def captions(self, index: int) -> list[str]:
        """See `Captions`."""
        exact, bases = self._names(index)
        for name in (*exact, *bases):
            found = self._rows.get(name) or self._by_key.get(name)
            if not found:
                continue
            if name not in exact and self._base_names[name] > 1:
                raise DataError(
                    f"{self._source.describe(index)} and other images match {name!r}, a row of {self._path}; name "
                    f"images by path, such as {exact[0]!r}"
                )
            return list(found)
        rows = counted(len(self._rows), "image")
        first = next(iter(self._rows), None)
        hint = "" if first is None else f", such as {first!r}"
        where = f"a row of {self._path} for {exact[0]!r}; the file has captions for {rows}{hint}"
        return _required([], self._source.describe(index), where)

    def _names(self, index: int) -> tuple[list[str], list[str]]:
        """Return the names by which a row may refer to an image, most specific first: with a path, then base names."""
        key = self._source.key(index)
        if isinstance(self._source, ImageFolder):
            path, folder = self._source.path(index), self._source.folder
            file = str(path.relative_to(folder))
            exact = [file, os.path.splitext(file)[0], key, str(path)]
        else:
            assert isinstance(self._source, ShardDataset), type(self._source)
            exact = [key, f"{key}.{self._source.suffix(index)}"]
        return exact, list(dict.fromkeys(name.rpartition("/")[2] for name in exact))

    @cached_property
    def _base_names(self) -> Counter[str]:
        """How many images have each base name."""
        return Counter(name for index in range(len(self._source)) for name in self._names(index)[1])


def _by_key(rows: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the captions of the rows that name image files, by the keys that preparation gives such files."""
    files = [name for name in rows if is_image(os.path.basename(name))]
    count = Counter(map(file_key, files))
    return {file_key(name, with_suffix=count[file_key(name)] > 1): rows[name] for name in files}


def read_table(path: Path) -> dict[str, list[str]]:
    """Return the captions of a table by the name of their image, without duplicates.

    Args:
        path: a `.csv` file with a header, or a `.jsonl` file with an object per line, in UTF-8.

    Raises:
        ConfigError: the file has another suffix.
        DataError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"the captions {path} must be a .csv or .jsonl file.")
    table: dict[str, list[str]] = {}
    rows = 0
    try:
        with open_regular(path) as raw:
            if os.fstat(raw.fileno()).st_size > MAX_TABLE_BYTES:
                raise ValueError(f"larger than the limit of {MAX_TABLE_BYTES:,} bytes")
            lines = _lines(io.TextIOWrapper(raw, "utf-8-sig", newline=""))
            for number, name, value in _csv_rows(lines) if suffix == ".csv" else _jsonl_rows(lines):
                with _naming_line(number):
                    key = _image(name)
                    known = table.get(key, [])
                    table[key] = clean_captions([*known, *(one for one in _one_line(value) if one not in known)])
                rows += 1
    except (OSError, ValueError, csv.Error) as error:
        after = f" after {counted(rows, 'row')}" if rows else ""
        raise DataError(f"the captions {path} cannot be read{after}: {reason(error)}") from None
    return {name: captions for name, captions in table.items() if captions}


@contextmanager
def _naming_line(number: int) -> Iterator[None]:
    """Within the context, the message of a `ValueError` gets the number of the line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {number}: {reason(error)}") from None


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any, Any]]:
    """Yield number of the line, name of the image and caption of each row."""
    reader = csv.reader(lines, strict=True)
    header = [name.strip().lower() for name in next(reader, [])]
    image, caption = (_column(header, keys) for keys in (IMAGE_KEYS, CAPTION_KEYS))
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(
                f"line {reader.line_num} has {counted(len(row), 'column')}, but the header has {len(header)}"
            )
        yield reader.line_num, row[header.index(image)], row[header.index(caption)]


def _jsonl_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any, Any]]:
    """Yield number of the line, name of the image and caption of each object."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with _naming_line(number):
            tree = parse_json_line(line)
            if not isinstance(tree, dict):
                raise ValueError(f"must be an object, got {line.strip()[:80]!r}")
            image, caption = (_column(tree, keys) for keys in (IMAGE_KEYS, CAPTION_KEYS))
        yield number, tree[image], tree[caption]


def _column(columns: Iterable[str], keys: Sequence[str]) -> str:
    """Return the first of some keys that is among the columns of a table."""
    columns = list(columns)
    for key in keys:
        if key in columns:
            return key
    raise ValueError(f"expected one of {', '.join(keys)} among its columns, got {json.dumps(columns)[:80]}")


def _image(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the name of an image must be a string, got {str(name)[:80]!r}")
    return os.path.normpath(name.strip())


def _lines(file: io.TextIOWrapper) -> Iterator[str]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"a line is longer than the limit of {MAX_LINE_BYTES:,} characters")
        yield line


def _one_line(value: Any) -> list[str]:
    """Return captions without duplicates, each run of whitespace replaced by a space."""
    return list(dict.fromkeys(" ".join(caption.split()) for caption in clean_captions(value)))


def _required(captions: list[str], image: str, expected: str) -> list[str]:
    if not captions:
        raise DataError(f"{image} has no caption; expected {expected}")
    return captions
