"""Text features: what encoders return for a prompt, and how it is stored.

A record stores one caption with its features, at their true length:

- int32: bytes of the caption, then the caption in UTF-8;
- for each encoder, int32: length l, then fp16: the pooled vector [P] and the tokens [l, F].

All numbers are little-endian. The member of an image holds one or more records: int32 count, int32 bytes of each
record, then the records.

Legend: L maximum tokens, l tokens of a prompt, F width of the tokens, P width of the pooled vector, N values of a row.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from diffmoe_ds.text_layout import MAX_ENCODERS, MAX_TOKENS, MAX_WIDTH, EncoderShape, TextLayout

MAX_CAPTIONS = 64
"""Most captions of an image."""
MAX_CAPTION_BYTES = 1 << 16
"""Most bytes of one caption."""
INT, FLOAT = np.dtype("<i4"), np.dtype("<f2")


class EncoderFeatures(NamedTuple):
    """What one encoder returns for a prompt."""

    pooled: np.ndarray
    """fp16 [P]."""
    tokens: np.ndarray
    """fp16 [l, F], with l from 1 to L."""


class Caption(NamedTuple):
    """A prompt with its features, one entry per encoder."""

    text: str
    features: tuple[EncoderFeatures, ...]


@dataclass(frozen=True)
class EncoderInfo(EncoderShape):
    """An encoder and the shape of its features."""

    name: str
    """Directory or hub ID from which it was loaded."""
    sha256: str
    """SHA-256 of everything that its features depend on: weights, tokenizer and settings."""


@dataclass(frozen=True)
class TextFormat:
    """The encoders of a dataset or a model, and their features for the empty prompt."""

    encoders: tuple[EncoderInfo, ...]
    """One or more."""
    null: bytes
    """Record of the empty prompt."""

    @property
    def layout(self) -> TextLayout:
        """Return the layout of rows."""
        return TextLayout(tuple(EncoderShape(*shape) for shape in self.shapes))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return (tokens, width, pooled width) of each encoder, as in `model.text_encoders`."""
        return tuple((encoder.tokens, encoder.width, encoder.pooled) for encoder in self.encoders)

    @property
    def null_row(self) -> np.ndarray:
        """Return the row of the empty prompt, fp16 [N]."""
        return padded_row(self.layout, decode_record(self.null, self.layout).features)

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain data."""
        encoders = [asdict(encoder) for encoder in self.encoders]
        return {"encoders": encoders, "null": base64.b64encode(self.null).decode()}


def text_format(tree: Any) -> TextFormat:
    """Return the format that plain data describes, as `TextFormat.to_json` returns it.

    Raises:
        ValueError: it is invalid.
    """
    names = [field.name for field in fields(EncoderInfo)]
    if not isinstance(tree, dict) or not isinstance(tree.get("null"), str):
        raise ValueError("not a text format")
    entries = tree.get("encoders")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENCODERS:
        raise ValueError(f"encoders must be a list of 1 to {MAX_ENCODERS} objects")
    for entry in entries:
        if not isinstance(entry, dict) or any(name not in entry for name in names):
            raise ValueError("an encoder lacks a key")
    encoders = tuple(EncoderInfo(**{name: entry[name] for name in names}) for entry in entries)
    for encoder in encoders:
        sizes = (encoder.tokens, MAX_TOKENS), (encoder.width, MAX_WIDTH), (encoder.pooled, MAX_WIDTH)
        if not all(type(size) is int and 0 < size <= limit for size, limit in sizes):
            raise ValueError("the shape of an encoder's features is out of range")
        if not isinstance(encoder.name, str) or not isinstance(encoder.sha256, str):
            raise ValueError("name and sha256 of an encoder must be strings")
    try:
        found = TextFormat(encoders, base64.b64decode(tree["null"], validate=True))
    except binascii.Error as error:
        raise ValueError(f"null: {error}") from None
    decode_record(found.null, found.layout)
    return found


def difference(found: TextFormat, expected: TextFormat) -> str | None:
    """Return how the encoders of two formats differ, in words; None if their features can be mixed."""
    if len(found.encoders) != len(expected.encoders):
        return f"{len(found.encoders)} text encoders instead of {len(expected.encoders)}"
    for number, (one, other) in enumerate(zip(found.encoders, expected.encoders, strict=True), 1):
        for name, label in (("width", "width"), ("pooled", "pooled width"), ("tokens", "token limit")):
            if getattr(one, name) != getattr(other, name):
                return (
                    f"text encoder {number} ({one.name}) has {label} {getattr(one, name)} instead of "
                    f"{getattr(other, name)} ({other.name})"
                )
        if one.sha256 != other.sha256:
            return (
                f"text encoder {number} ({one.name}) has the sha256 {one.sha256[:12]} instead of "
                f"{other.sha256[:12]} ({other.name})"
            )
    return None


def encode_record(caption: Caption) -> bytes:
    """Encode one caption with its features."""
    text = caption.text.encode()
    assert len(text) <= MAX_CAPTION_BYTES, len(text)
    parts = [np.array(len(text), INT).tobytes(), text]
    for pooled, tokens in caption.features:
        parts += [np.array(len(tokens), INT).tobytes(), np.asarray(pooled, FLOAT).tobytes()]
        parts.append(np.ascontiguousarray(tokens, FLOAT).tobytes())
    return b"".join(parts)


def decode_record(data: bytes, layout: TextLayout) -> Caption:
    """Decode a record.

    Args:
        data: the record.
        layout: shapes of the encoders.

    Raises:
        ValueError: it is invalid for the layout, or contains NaN or Inf.
    """
    reader = _Reader(data)
    text = reader.take(reader.integer(MAX_CAPTION_BYTES)).decode()
    features = []
    for encoder in layout.encoders:
        length = reader.integer(encoder.tokens)
        if not length:
            raise ValueError("a record has features without tokens")
        pooled = reader.floats(encoder.pooled)
        features.append(EncoderFeatures(pooled, reader.floats(length * encoder.width).reshape(length, encoder.width)))
    if reader.left:
        raise ValueError(f"a record has {reader.left} bytes too many")
    if not all(np.isfinite(array).all() for each in features for array in each):
        raise ValueError("a record contains NaN or Inf")
    return Caption(text, tuple(features))


def padded_row(layout: TextLayout, features: Sequence[EncoderFeatures]) -> np.ndarray:
    """Return the row of a prompt, fp16 [N]."""
    row, start = np.zeros(layout.values, np.float16), 0
    for encoder, (pooled, tokens) in zip(layout.encoders, features, strict=True):
        assert pooled.shape == (encoder.pooled,) and tokens.shape[1:] == (encoder.width,), (encoder, tokens.shape)
        row[start] = len(tokens)
        first = start + 1 + encoder.pooled
        row[start + 1 : first] = pooled
        row[first : first + tokens.size] = tokens.reshape(-1)
        start += encoder.values
    return row


def encode_member(captions: Sequence[Caption]) -> bytes:
    """Encode the captions of an image, 1 to `MAX_CAPTIONS`."""
    assert 1 <= len(captions) <= MAX_CAPTIONS, len(captions)
    records = [encode_record(caption) for caption in captions]
    head = np.array([len(records), *map(len, records)], INT)
    return b"".join([head.tobytes(), *records])


MAX_HEAD_BYTES = INT.itemsize * (1 + MAX_CAPTIONS)
"""Most bytes that a member has before its first record."""


def record_ranges(head: bytes, size: int) -> list[range]:
    """Return the bytes of each record within a member.

    Args:
        head: the first `MAX_HEAD_BYTES` of the member, or all of a shorter one.
        size: bytes of the member.

    Raises:
        ValueError: the head is invalid.
    """
    reader = _Reader(head)
    count = reader.integer(MAX_CAPTIONS)
    sizes = [reader.integer(size) for _ in range(count)]
    ends = np.cumsum([INT.itemsize * (1 + count), *sizes]).tolist()
    if not count or ends[-1] != size:
        raise ValueError(f"{count} records of {ends[-1]} bytes in a member of {size} bytes")
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


class _Reader:
    """Reads numbers from bytes, within their bounds."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._start = 0

    @property
    def left(self) -> int:
        """Number of unread bytes."""
        return len(self._data) - self._start

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if size > self.left:
            raise ValueError(f"{size} bytes expected where {self.left} are left")
        self._start += size
        return self._data[self._start - size : self._start]

    def integer(self, limit: int) -> int:
        """Return the next integer, from 0 to a limit."""
        value = int(np.frombuffer(self.take(INT.itemsize), INT)[0])
        if not 0 <= value <= limit:
            raise ValueError(f"{value} where a number from 0 to {limit} is expected")
        return value

    def floats(self, count: int) -> np.ndarray:
        """Return the next fp16 numbers."""
        return np.frombuffer(self.take(count * FLOAT.itemsize), FLOAT)
