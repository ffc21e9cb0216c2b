"""The index files of a directory of shards.

`index.json` lists the shards with their sizes and the formats of latents, text and image features, `index-samples.npy`
holds a row per sample and `index-keys.npy` the concatenated keys. If samples have captions or text features,
`index-text.npy` holds a row for each; if they have image features, `index-features.npy` does. One process of a host
verifies the checksums of the arrays (`verified.py`); they are memory-mapped, so all ranks and workers share them.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.control_files import MAX_INDEX_BYTES, open_regular, read_json
from diffmoe_ds.data.sources.image_features import FEATURES_COLUMNS, feature_format, valid_features
from diffmoe_ds.data.sources.latents import latent_format
from diffmoe_ds.data.sources.tar_headers import MAX_MEMBER_BYTES
from diffmoe_ds.data.sources.tar_index import (
    IMAGE_SUFFIXES,
    MAX_LABEL,
    NO_LABEL,
    NOT_STORED,
    Entry,
    Index,
    ShardInfo,
    check_features,
    check_latents,
    check_text,
)
from diffmoe_ds.data.sources.text_index import TextEntry, valid_text
from diffmoe_ds.data.sources.verified import has_sha256
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import atomic_write, sha256_of, write_json
from diffmoe_ds.npy import read_header, write_array
from diffmoe_ds.text import reason
from diffmoe_ds.text_features import text_format

INDEX = "index.json"
SAMPLES = "index-samples.npy"
KEYS = "index-keys.npy"
TEXT = "index-text.npy"
FEATURES = "index-features.npy"
ARRAYS = (SAMPLES, KEYS, TEXT, FEATURES)
VERSION = 1
ROWS_AT_ONCE = 1 << 16
"""Rows that are checked together, so that the check of a large index takes little memory."""
MAX_SHARD_NAME = 3000
"""Most bytes of a shard's name, which is quoted in errors."""
SETTINGS = "settings.json"
"""The settings of a preparation; kept when the dataset is finished."""
PARTS = "parts"
"""Records of finished shards, until the index is built from them."""


def save_index(index: Index, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write an index into a folder.

    Args:
        index: the index.
        folder: the folder of the shards.
        extra: further entries of `index.json`.

    Raises:
        CheckpointError: the files cannot be written.
    """
    arrays = {SAMPLES: index.samples, KEYS: index.keys}
    if index.text is not None:
        arrays[TEXT] = index.text
    if index.features is not None:
        arrays[FEATURES] = index.features
    for name, array in arrays.items():
        with atomic_write(folder / name) as file:
            write_array(file, array.shape, array.dtype, [array])
    tree = {
        "version": VERSION,
        "samples": len(index.samples),
        "key_bytes": len(index.keys),
        "index_sha256": {name: sha256_of(folder / name) for name in arrays},
        "latents": None if index.latents is None else index.latents.to_json(),
        "text": None if index.text_format is None else index.text_format.to_json(),
        "features": None if index.feature_format is None else index.feature_format.to_json(),
        **(extra or {}),
        "shards": [shard._asdict() for shard in index.shards],
    }
    write_json(folder / INDEX, tree)


def load_index(folder: Path, *, rehash: bool = False) -> Index:
    """Read the index of a folder.

    Args:
        folder: the folder of the shards.
        rehash: hash the arrays even if a process of this host has verified them recently.

    Raises:
        DataError: its files are damaged or do not match each other.
    """
    prepared = (folder / SETTINGS).exists()
    remedy = "run the same diffmoe prepare again" if prepared else "delete it to regenerate it"
    try:
        tree = read_json(folder / INDEX, MAX_INDEX_BYTES)
        shards = tuple(map(shard_info, tree["shards"]))
        latents = None if tree["latents"] is None else latent_format(tree["latents"])
        form = None if tree.get("text") is None else text_format(tree["text"])
        features = None if tree.get("features") is None else feature_format(tree["features"])
        # Datasets from before the checksums existed have none, nor text or image features.
        sums = tree.get("index_sha256", {})
        hashes = [(folder / name, sha256) for name, sha256 in sums.items() if name in ARRAYS]
        classes = _class_names(tree.get("classes"))
        samples, keys = (_map(folder / name) for name in (SAMPLES, KEYS))  # before a file of any size is hashed
        text, places = (_map(folder / name) if name in sums else None for name in (TEXT, FEATURES))
        fits = all(has_sha256(file, sha256, rehash=rehash) for file, sha256 in hashes)
        fits = fits and samples.shape == (tree["samples"], len(Entry._fields)) and samples.dtype == np.int64
        fits = fits and keys.shape == (tree["key_bytes"],) and keys.dtype == np.uint8
        fits = fits and (form is None if text is None else _fits(text, len(samples), len(TextEntry._fields)))
        fits = fits and (features is None) == (places is None)
        fits = fits and (places is None or _fits(places, len(samples), FEATURES_COLUMNS))
        fits = fits and tree["version"] == VERSION and sum(shard.samples for shard in shards) == len(samples)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the index {folder / INDEX} cannot be read: {reason(error)}; {remedy}") from None
    if not fits:
        raise DataError(f"the files of the index {folder / INDEX} do not match each other; {remedy}")
    index = Index(shards, samples, keys, latents, classes, text, form, places, features)
    check_rows(index, str(folder / INDEX), remedy)
    return index


def check_rows(index: Index, source: str, remedy: str) -> None:
    """Check that the samples of an index are within their shards, and their keys within the keys.

    Args:
        index: the index.
        source: its name, for messages.
        remedy: end of the message: what the user can do.

    Raises:
        DataError: a number is out of range.
    """
    shard_bytes = np.array([shard.bytes for shard in index.shards], np.int64)
    ends = np.cumsum([shard.samples for shard in index.shards])
    for first in range(0, len(index.samples), ROWS_AT_ONCE):
        rows = index.samples[first : first + ROWS_AT_ONCE]
        shard, suffix, offset, size, label, key_offset, key_size = rows.T
        expected = np.searchsorted(ends, np.arange(first, first + len(rows)), side="right")
        stored = offset >= tarfile.BLOCKSIZE
        valid = (shard == expected) & (suffix >= 0) & (suffix < len(IMAGE_SUFFIXES))
        valid &= (size >= 0) & (size <= MAX_MEMBER_BYTES) & (stored | (offset == NOT_STORED) & (size == 0))
        # Differences, because sums of hostile numbers would overflow.
        valid &= offset <= shard_bytes[expected] - size
        valid &= (label >= NO_LABEL) & (label <= MAX_LABEL)
        valid &= (key_offset >= 0) & (key_size >= 0) & (key_offset <= len(index.keys) - key_size)
        text = None if index.text is None else index.text[first : first + ROWS_AT_ONCE]
        if text is not None:
            valid &= valid_text(text, shard_bytes[expected], MAX_MEMBER_BYTES)
        features = None if index.features is None else index.features[first : first + ROWS_AT_ONCE]
        block = replace(index, samples=rows, text=text, features=features)
        if features is not None and index.feature_format is not None:
            valid &= valid_features(features, index.feature_format, shard_bytes[expected])
        if not valid.all():
            number = first + int(np.argmin(valid))
            raise DataError(f"the index {source} has numbers out of range for sample {number}; {remedy}")
        check_latents(block)
        check_text(block)
        check_features(block)


def shard_info(tree: Any) -> ShardInfo:
    """Return the shard that an index or a record describes.

    Raises:
        ValueError, KeyError, TypeError: a value is missing or invalid.
    """
    info = ShardInfo(tree["name"], tree["bytes"], tree["samples"])
    numbers = (info.bytes, info.samples)
    valid = type(info.name) is str and len(os.fsencode(info.name)) <= MAX_SHARD_NAME and "\0" not in info.name
    if not valid or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"invalid shard {str(info)[:200]}")
    return info


def listed(folder: Path) -> list[str]:
    """Return the shards that `index.json` lists; none if it is missing, or damaged, which `load_index` reports."""
    try:
        names = [shard_info(shard).name for shard in read_json(folder / INDEX, MAX_INDEX_BYTES)["shards"]]
        return [name for name in names if name and os.path.basename(name) == name]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def subset(index: Index, names: Sequence[str]) -> Index | None:
    """Return the index of some shards, in the order of their names; None if it lacks any."""
    numbers = {shard.name: number for number, shard in enumerate(index.shards)}
    if not all(name in numbers for name in names):
        return None
    chosen = [numbers[name] for name in names]
    if chosen == list(range(len(index.shards))):
        return index
    ends = np.cumsum([shard.samples for shard in index.shards])
    places = [slice(ends[old] - index.shards[old].samples, ends[old]) for old in chosen]
    samples = np.concatenate([index.samples[place] for place in places])
    shards = tuple(index.shards[old] for old in chosen)
    samples[:, 0] = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    text = None if index.text is None else np.concatenate([index.text[place] for place in places])
    features = None if index.features is None else np.concatenate([index.features[place] for place in places])
    return replace(index, shards=shards, samples=samples, text=text, features=features)


def array_names(index: Path) -> list[str]:
    """Return the arrays that belong to an `index.json`, which may be damaged, which `load_index` reports."""
    try:
        sums = read_json(index, MAX_INDEX_BYTES)["index_sha256"]
        return [SAMPLES, KEYS, *(name for name in (TEXT, FEATURES) if name in sums)]
    except (OSError, ValueError, LookupError, TypeError):
        return [SAMPLES, KEYS]


def refuse_unfinished(folder: Path) -> None:
    """Check that a folder does not hold an unfinished preparation, one without an index.

    Raises:
        DataError: it does.
    """
    if (folder / INDEX).exists():
        return
    begun = (folder / PARTS).is_dir() and any(folder.glob("shards-*.tar"))
    with contextlib.suppress(OSError, ValueError, TypeError):  # other programs also have a settings.json
        begun = begun or "keys_and_labels" in read_json(folder / SETTINGS)
    if begun:
        raise DataError(f"the preparation in {folder} is not finished; run the same diffmoe prepare again to finish it")


def _class_names(names: Any) -> tuple[str, ...] | None:
    if not isinstance(names, (list, type(None))) or not all(isinstance(name, str) for name in names or ()):
        raise ValueError("classes is not a list of names")
    return None if names is None else tuple(names)


def _fits(table: np.ndarray, samples: int, columns: int) -> bool:
    return table.shape == (samples, columns) and table.dtype == np.int64


def _map(path: Path) -> np.ndarray:
    """Memory-map an array read-only, without pickles; an empty array cannot be mapped."""
    with open_regular(path) as file:
        header = read_header(file)
        if header.by_columns or os.fstat(file.fileno()).st_size != header.length + header.array_bytes:
            raise ValueError(f"{path.name} {header.describe()} has another size")
        if not header.array_bytes:
            return np.empty(header.shape, header.dtype)
        return np.memmap(file, header.dtype, "r", header.length, header.shape)
