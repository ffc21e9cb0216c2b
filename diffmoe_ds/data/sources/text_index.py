"""Where shards hold text: the captions (`KEY.txt` or `KEY.json`) and the text features (`KEY.text`) of samples.

The first member of every shard with text features, `__text__`, describes their format, so shards can be moved and
combined; WebDataset skips members with such names.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffmoe_ds.control_files import parse_json
from diffmoe_ds.data.sources.format_members import parse_member
from diffmoe_ds.text_features import (
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    MAX_HEAD_BYTES,
    Caption,
    TextFormat,
    decode_record,
    difference,
    record_ranges,
    text_format,
)
from diffmoe_ds.text_layout import TextLayout

TEXT_FORMAT_MEMBER = "__text__"
MAX_TEXT_FORMAT_BYTES = 4 << 20
TEXT_SUFFIX = "text"
CAPTION_SUFFIXES = ("txt", "json")
"""The first one that a sample has holds its captions. Indices store positions in this tuple."""
CAPTION_KEYS = ("caption", "captions", "text", "prompt")
"""Keys of a JSON object with captions; the first one that is present counts."""
MAX_CAPTIONS_BYTES = MAX_CAPTIONS * MAX_CAPTION_BYTES
"""Most bytes of a member with captions."""


Read = Callable[[int, int], bytes]
"""Returns the bytes of a shard at an offset, of a size."""


class TextEntry(NamedTuple):
    """A row of the index of text. Offsets and sizes are in bytes, and 0 for what the sample lacks."""

    suffix: int  # of the captions, in CAPTION_SUFFIXES
    captions_offset: int  # in the shard
    captions_size: int
    offset: int  # of the text features in the shard
    size: int


CAPTIONS = TextEntry._fields.index("captions_offset")
FEATURES = TextEntry._fields.index("offset")
"""Column of an offset; the size is in the next one."""


def parse_text_format(data: bytes, where: str) -> TextFormat:
    """Parse the `__text__` member of a shard.

    Args:
        data: its contents.
        where: the shard, for messages.

    Raises:
        DataError: it is invalid.
    """
    problem = f"{where} has an invalid {TEXT_FORMAT_MEMBER}, which describes text features"
    return parse_member(data, text_format, problem, "diffmoe prepare text")


def text_entry(members: Mapping[str, tuple[int, int]]) -> TextEntry:
    """Return the row of a sample.

    Args:
        members: offset and size of each of its members, by suffix.
    """
    for number, suffix in enumerate(CAPTION_SUFFIXES):
        if suffix in members:
            return TextEntry(number, *members[suffix], *members.get(TEXT_SUFFIX, (0, 0)))
    return TextEntry(0, 0, 0, *members.get(TEXT_SUFFIX, (0, 0)))


def text_table(rows: np.ndarray, form: TextFormat | None) -> np.ndarray | None:
    """Return the rows of a shard's samples, int64 [n, 5]; None if they have neither captions nor text features.

    Args:
        rows: the rows, which are changed: without a format, `.text` members are not text features.
        form: format of the text features, if the shard has any.
    """
    if form is None:
        rows[:, FEATURES:] = 0
    return rows if form is not None or rows.any() else None


def text_difference(found: TextFormat | None, expected: TextFormat | None) -> str | None:
    """Return how two formats of text features differ, in words; None if features of both can be mixed."""
    if found is None or expected is None:
        return None if found is expected else "only one of them holds any"
    return difference(found, expected)


def valid_text(rows: np.ndarray, shard_bytes: np.ndarray, max_bytes: int) -> np.ndarray:
    """Return for each row whether its numbers are within the shard, bool [n].

    Args:
        rows: int64 [n, 5], see `TextEntry`.
        shard_bytes: int64 [n], bytes of the shard of each row.
        max_bytes: most bytes of text features.
    """
    valid = (rows[:, 0] >= 0) & (rows[:, 0] < len(CAPTION_SUFFIXES))
    for column in (CAPTIONS, FEATURES):
        offset, size = rows[:, column], rows[:, column + 1]
        valid &= (size >= 0) & ((offset >= tarfile.BLOCKSIZE) | (offset == 0) & (size == 0))
        valid &= offset <= shard_bytes - size  # a difference, because the sum of hostile numbers would overflow
    return np.asarray(valid & (rows[:, FEATURES + 1] <= max_bytes))


def read_records(entry: TextEntry, read: Read, layout: TextLayout, choice: float | None = None) -> list[Caption]:
    """Return the captions of a sample with their text features.

    Args:
        entry: where they are.
        read: reads the sample's shard.
        layout: shapes of the features.
        choice: which caption to read, as a fraction from 0 (the first) to less than 1; None reads all.

    Raises:
        ValueError: they are invalid.
    """
    places = record_ranges(read(entry.offset, min(entry.size, MAX_HEAD_BYTES)), entry.size)
    if choice is not None:
        places = [places[int(choice * len(places))]]
    return [decode_record(read(entry.offset + place.start, len(place)), layout) for place in places]


def read_plain(entry: TextEntry, read: Read) -> list[str]:
    """Return the captions in the `.txt` or `.json` of a sample.

    Args:
        entry: where they are.
        read: reads the sample's shard.

    Raises:
        ValueError: they are invalid.
    """
    if entry.captions_size > MAX_CAPTIONS_BYTES:
        raise ValueError(f"it has {entry.captions_size:,} bytes; the limit is {MAX_CAPTIONS_BYTES:,}")
    return parse_captions(CAPTION_SUFFIXES[entry.suffix], read(entry.captions_offset, entry.captions_size))


def parse_captions(suffix: str, data: bytes) -> list[str]:
    """Return the captions in a `.txt` or `.json` file or member; none if it has none.

    Args:
        suffix: `txt`: each line that is not empty is a caption; `json`: an object in which a key of `CAPTION_KEYS`
            holds a caption or a list of them.
        data: the contents, in UTF-8, at most `MAX_CAPTIONS_BYTES`.

    Raises:
        ValueError: it is invalid, or a limit is exceeded.
    """
    text = data.decode("utf-8-sig")
    captions: object = text.split("\n")
    if suffix == "json":
        tree = parse_json(text)
        keys = [key for key in CAPTION_KEYS if key in tree] if isinstance(tree, dict) else []
        captions = tree[keys[0]] if keys else []
    return clean_captions(captions)


def clean_captions(value: object) -> list[str]:
    """Return captions without surrounding space, and without those that are empty.

    Args:
        value: a string, a list of strings, or None.

    Raises:
        ValueError: it is something else, or a limit is exceeded.
    """
    found: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in found):
        raise ValueError("a caption must be a string or a list of strings")
    captions = [caption.strip() for caption in found if caption.strip()]
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(f"{len(captions):,} captions; the limit is {MAX_CAPTIONS}")
    if any(len(caption.encode()) > MAX_CAPTION_BYTES for caption in captions):
        raise ValueError(f"a caption of more than {MAX_CAPTION_BYTES:,} bytes")
    return captions
