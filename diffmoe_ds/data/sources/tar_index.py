"""Find the samples of shards by reading tar headers; `index_files.py` stores the result.

A shard is a tar file.  Adjacent members with the same key (the name up to the first dot of its base name) form a
sample.  Nothing is extracted or unpickled, and only images, labels, captions and text features are read.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from diffmoe_ds.config.fields import printable
from diffmoe_ds.data.sources.image_features import (
    FEATURES_COLUMNS,
    FEATURES_MEMBER,
    FEATURES_SUFFIX,
    FeatureFormat,
    feature_entry,
)
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.tar_headers import Formats, Headers, check_member, read_label
from diffmoe_ds.data.sources.text_index import (
    CAPTION_SUFFIXES,
    CAPTIONS,
    FEATURES,
    TEXT_FORMAT_MEMBER,
    TEXT_SUFFIX,
    TextEntry,
    text_difference,
    text_entry,
    text_table,
)
from diffmoe_ds.errors import DataError
from diffmoe_ds.text import quoted, reason
from diffmoe_ds.text_features import TextFormat

MAX_LABEL = 999_999_999
MAX_NAME = 4096
"""Most characters of a member's name, as of a path on Linux."""
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "npy", "gif", "bmp", "tif", "tiff")
"""Indices store positions in this tuple, so new suffixes are appended."""
RARE_SUFFIXES = ("gif", "bmp", "tif", "tiff")
"""Used as the image only if there is no other: a mask may accompany a photograph."""
LABEL_SUFFIX = "cls"
NO_LABEL = -1
NOT_STORED = 0
"""Offset of an image that is a link or another special member, which has no bytes."""


class Entry(NamedTuple):
    """A row of the index.  Offsets and sizes are in bytes."""

    shard: int
    suffix: int  # of the image, in IMAGE_SUFFIXES
    offset: int  # of the image in its shard, or NOT_STORED
    size: int
    label: int  # NO_LABEL if the sample has none
    key_offset: int  # in the joined keys
    key_size: int


class ShardInfo(NamedTuple):
    """One shard of an index."""

    name: str
    bytes: int
    samples: int


@dataclass(frozen=True)
class Index:
    """All samples of some shards, in storage order."""

    shards: tuple[ShardInfo, ...]
    samples: np.ndarray  # int64 [n, len(Entry._fields)]
    keys: np.ndarray  # uint8, the UTF-8 of all keys
    latents: LatentFormat | None = None
    classes: tuple[str, ...] | None = None  # name of each label, if labels have names
    text: np.ndarray | None = None  # int64 [n, len(TextEntry._fields)], if samples have captions or text features
    text_format: TextFormat | None = None  # of text features, if samples have any
    features: np.ndarray | None = None  # int64 [n, 2], offset and size of image features, if samples have any
    feature_format: FeatureFormat | None = None  # of image features, if samples have any

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        entry = Entry(*self.samples[index].tolist())
        name = self.keys[entry.key_offset : entry.key_offset + entry.key_size].tobytes()
        return name.decode("utf-8", "surrogateescape")


def join(parts: Sequence[Index]) -> Index:
    """Concatenate indices.

    Raises:
        DataError: the shards hold latents, text features or image features of different formats.
    """
    latents, features = parts[0].latents, parts[0].feature_format
    first_shard, first_key, blocks = 0, 0, []
    for part in parts:
        shards = f"shards {parts[0].shards[0].name} and {part.shards[0].name}"
        if part.latents != latents:
            raise DataError(f"{shards} hold latents of different formats: {latents} and {part.latents}")
        if part.feature_format != features:
            raise DataError(f"{shards} hold different image features: {features} and {part.feature_format}")
        shift = Entry(first_shard, 0, 0, 0, 0, first_key, 0)
        blocks.append(part.samples + np.array(shift, np.int64))
        first_shard += len(part.shards)
        first_key += len(part.keys)
    text, text_format = _join_text(parts)
    return Index(
        tuple(shard for part in parts for shard in part.shards),
        np.concatenate(blocks),
        np.concatenate([part.keys for part in parts]),
        latents,
        text=text,
        text_format=text_format,
        features=None if features is None else np.concatenate([p.features for p in parts if p.features is not None]),
        feature_format=features,
    )


def _join_text(parts: Sequence[Index]) -> tuple[np.ndarray | None, TextFormat | None]:
    """Concatenate the text of indices.

    Raises:
        DataError: the shards hold text features of different formats, or only some of them hold any.
    """
    form = parts[0].text_format
    for part in parts:
        found = text_difference(part.text_format, form)
        if found is not None:
            raise DataError(
                f"shards {parts[0].shards[0].name} and {part.shards[0].name} hold different text features: {found}"
            )
    if all(part.text is None for part in parts):
        return None, form
    empty = np.zeros((1, len(TextEntry._fields)), np.int64)
    blocks = [np.repeat(empty, len(part.samples), 0) if part.text is None else part.text for part in parts]
    return np.concatenate(blocks), form


def scan(shard: str, file: BinaryIO, size: int) -> Index:
    """Index one plain tar file.

    Args:
        shard: its name, for messages and the index.
        file: the tar file.
        size: its bytes.

    Raises:
        DataError: the file is not a complete tar, a sample has no image or several, a label is not a number, only some
            samples have text or image features, or a member is too large or has a name that leads out of the archive.
    """
    rows, texts, features, keys = array("q"), array("q"), array("q"), bytearray()
    formats = Formats()
    try:
        for key, members in _samples(shard, file, formats):
            where = f"sample {quoted(key)} of shard {shard}"
            suffix, (offset, length) = _image(where, members)
            label = read_label(where, file, members[LABEL_SUFFIX]) if LABEL_SUFFIX in members else NO_LABEL
            name = key.encode("utf-8", "surrogateescape")
            rows.extend(Entry(0, IMAGE_SUFFIXES.index(suffix), offset, length, label, len(keys), len(name)))
            texts.extend(text_entry(members))
            features.extend(feature_entry(members))
            keys += name
    except RecursionError:
        raise DataError(f"shard {shard} has a member with hundreds of headers") from None
    except (OSError, EOFError, tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard {shard} is not a readable, complete tar or tar.gz file: {reason(error)}") from error
    samples = np.frombuffer(rows, np.int64).reshape(-1, len(Entry._fields))
    index = Index(
        (ShardInfo(shard, size, len(samples)),),
        samples,
        np.frombuffer(bytes(keys), np.uint8),
        formats.latents,
        text=text_table(np.array(texts, np.int64).reshape(-1, len(TextEntry._fields)), formats.text),
        text_format=formats.text,
        features=None if formats.features is None else np.array(features, np.int64).reshape(-1, FEATURES_COLUMNS),
        feature_format=formats.features,
    )
    check_latents(index)
    check_text(index)
    check_features(index)
    return index


def only_images(index: Index, tar: bytes) -> tuple[Index, bytes]:
    """Return images, text and image features of a tar file in one block, and their index.

    Small images take a fraction of the tar file.

    Args:
        index: the samples of the tar file.
        tar: its contents.
    """
    samples, text = np.array(index.samples), None if index.text is None else np.array(index.text)
    features = None if index.features is None else np.array(index.features)
    places = [(samples, Entry._fields.index("offset"))]
    if text is not None:
        places += [(text, CAPTIONS), (text, FEATURES)]
    if features is not None:
        places.append((features, 0))
    view, parts = memoryview(tar), [memoryview(bytes(1))]
    end = 1  # after a byte, because no member is at NOT_STORED
    for table, column in places:
        offsets, sizes = table[:, column], table[:, column + 1]
        parts += [view[offset : offset + size] for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True)]
        starts = end + np.cumsum(sizes) - sizes
        end += int(sizes.sum())
        offsets[:] = np.where(offsets == NOT_STORED, NOT_STORED, starts)
    return replace(index, samples=samples, text=text, features=features), b"".join(parts)


def without_labels(index: Index) -> Index:
    """Return the same samples without labels."""
    samples = np.array(index.samples)
    samples[:, Entry._fields.index("label")] = NO_LABEL
    return replace(index, samples=samples, classes=None)


def check_latents(index: Index) -> None:
    """Check that samples have the size of the latents that their shards describe.

    Raises:
        DataError: one does not.
    """
    if index.latents is None:
        return
    suffix, size = IMAGE_SUFFIXES.index("npy"), index.latents.member_bytes
    wrong = (index.samples[:, 1] != suffix) | (index.samples[:, 3] != size)
    if wrong.any():
        number = int(np.argmax(wrong))
        entry = Entry(*index.samples[number].tolist())
        raise DataError(
            f"sample {quoted(index.key(number))} of shard {index.shards[entry.shard].name} has a "
            f".{IMAGE_SUFFIXES[entry.suffix]} of {entry.size} bytes; expected a .npy latent of {size} bytes"
        )


def check_text(index: Index) -> None:
    """Check that all samples have text features or none has.

    Raises:
        DataError: some lack them.
    """
    if index.text_format is None or index.text is None:
        assert index.text_format is None, "a format comes with a table"
        return
    lacks = index.text[:, FEATURES] == 0
    if lacks.any():
        number = int(np.argmax(lacks))
        raise DataError(
            f"sample {quoted(index.key(number))} of shard {index.shards[index.samples[number, 0]].name} has no "
            f".{TEXT_SUFFIX}, but its shard has a {TEXT_FORMAT_MEMBER}; expected text features next to every image, or "
            "to none"
        )


def check_features(index: Index) -> None:
    """Check that all samples have image features of the size that their shards describe, or none has any.

    Raises:
        DataError: some lack them, or have others.
    """
    if index.feature_format is None or index.features is None:
        assert index.feature_format is None, "a format comes with a table"
        return
    size = 2 * index.feature_format.half_bytes
    wrong = index.features[:, 1] != size
    if wrong.any():
        number = int(np.argmax(wrong))
        found = int(index.features[number, 1])
        raise DataError(
            f"sample {quoted(index.key(number))} of shard {index.shards[index.samples[number, 0]].name} has "
            f"{f'a .{FEATURES_SUFFIX} of {found:,} bytes' if found else f'no .{FEATURES_SUFFIX}'}, but its shard has a "
            f"{FEATURES_MEMBER}; expected image features of {size:,} bytes next to every image"
        )


Members = dict[str, tuple[int, int]]


def _samples(shard: str, file: BinaryIO, formats: Formats) -> Iterator[tuple[str, Members]]:
    """Yield key and members `{suffix: (offset, size)}` of each sample, grouped as in WebDataset."""
    current = ""
    members: Members = {}
    headers = Headers(shard, file)
    with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # the headers of all members, which tarfile would keep
            headers.start_member(tar.offset)
            if len(member.name) > MAX_NAME:
                raise DataError(
                    f"shard {shard} has a member whose name has {len(member.name):,} characters; the limit is "
                    f"{MAX_NAME:,}"
                )
            if formats.read(shard, file, member):
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            key, suffix = folder + slash + stem, suffix.lower()
            stored = member.isreg() and not member.issparse()
            # Directories, hidden files, links and devices do not belong to a sample.  An image that is a link does: it
            # cannot be read, and skipping it would lose a sample silently.
            if not (stem and dot) or member.isdir() or not (stored or suffix in IMAGE_SUFFIXES):
                continue
            if key != current:
                if members:
                    yield current, members
                current, members = key, {}
            if suffix in members:
                raise DataError(
                    f"sample {quoted(key)} of shard {shard} has two {printable(f'.{suffix}')} members; expected one"
                )
            if suffix in (*IMAGE_SUFFIXES, LABEL_SUFFIX, TEXT_SUFFIX, FEATURES_SUFFIX):
                check_member(shard, member)
            elif suffix in CAPTION_SUFFIXES and member.size < 0:
                raise tarfile.ReadError(f"member {quoted(member.name)} has a negative size")
            members[suffix] = (member.offset_data, member.size) if stored else (NOT_STORED, 0)
        # tarfile treats a damaged or truncated header as the end of the archive; the real end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no valid header or end mark at byte {tar.offset}")
    if members:
        yield current, members


def _image(where: str, members: dict[str, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    """Return suffix, and offset and size, of a sample's image."""
    found = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    images = [suffix for suffix in found if suffix not in RARE_SUFFIXES] or found
    if len(images) != 1:
        names = ", ".join(printable(f".{suffix}") for suffix in list(members)[:8])
        raise DataError(
            f"{where} has {len(images) or 'no'} image{'s' * (len(images) > 1)} among its members {names}; "
            f"expected one of .{', .'.join(IMAGE_SUFFIXES)}, stored next to the other members of its key"
        )
    return images[0], members[images[0]]
