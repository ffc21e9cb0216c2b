"""The index of a directory of shards, in files that are shared.

``index.json`` holds the shards with their sizes and how latents were made, ``index-samples.npy`` a row per sample and
``index-keys.npy`` the keys, joined.  Opening it reads the arrays once, for their checksums; they are mapped into
memory, so that all workers share them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.data.sources.latents import parse_format
from diffmoe_ds.data.sources.tar_index import Entry, Index, ShardInfo
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import atomic_write, sha256_of, write_json

INDEX = "index.json"
SAMPLES = "index-samples.npy"
KEYS = "index-keys.npy"
VERSION = 1
SETTINGS = "settings.json"
"""What a preparation was begun with; it stays when the set is finished."""
PARTS = "parts"
"""The records of a preparation's finished shards, until the index is made of them."""


def save_index(index: Index, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write an index into ``folder``, complete or not at all; ``extra`` goes into ``index.json`` as it is.

    Raises ``CheckpointError`` if the files cannot be written.
    """
    for name, array in ((SAMPLES, index.samples), (KEYS, index.keys)):
        with atomic_write(folder / name) as file:
            np.save(file, array, allow_pickle=False)
    tree = {
        "version": VERSION,
        "samples": len(index.samples),
        "key_bytes": len(index.keys),
        "index_sha256": {name: sha256_of(folder / name) for name in (SAMPLES, KEYS)},
        "latents": None if index.latents is None else index.latents.to_json(),
        **(extra or {}),
        "shards": [shard._asdict() for shard in index.shards],
    }
    write_json(folder / INDEX, tree)


def load_index(folder: Path) -> Index:
    """The index in ``folder``; raises ``DataError`` if its files are damaged or do not belong together."""
    prepared = (folder / SETTINGS).exists()
    remedy = "run the same diffmoe prepare again" if prepared else "delete it to have it made anew"
    try:
        tree = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = tuple(ShardInfo(str(s["name"]), int(s["bytes"]), int(s["samples"])) for s in tree["shards"])
        latents = tree["latents"]
        if latents is not None:
            latents = parse_format(json.dumps(latents).encode(), str(folder / INDEX))
        # Sets that were made before the checksums are opened without them.
        hashes = tree.get("index_sha256", {}).items()
        fits = all(sha256_of(folder / name) == sha256 for name, sha256 in hashes if name in (SAMPLES, KEYS))
        samples, keys = (_map(folder / name) for name in (SAMPLES, KEYS))
        fits = fits and samples.shape == (tree["samples"], len(Entry._fields)) and samples.dtype == np.int64
        fits = fits and keys.shape == (tree["key_bytes"],) and keys.dtype == np.uint8
        fits = fits and tree["version"] == VERSION and sum(shard.samples for shard in shards) == len(samples)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the index {folder / INDEX} cannot be read: {error!r}; {remedy}") from None
    if not fits:
        raise DataError(f"the files of the index {folder / INDEX} do not fit together; {remedy}")
    return Index(shards, samples, keys, latents)


def listed(folder: Path) -> list[str]:
    """The shards that ``index.json`` names; none without one, or if it is damaged, which `load_index` reports."""
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        return [shard["name"] for shard in shards if Path(shard["name"]).name == shard["name"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def subset(index: Index, names: Sequence[str]) -> Index | None:
    """The index of the shards of these names, in their order; none if it does not have them all."""
    numbers = {shard.name: number for number, shard in enumerate(index.shards)}
    if not all(name in numbers for name in names):
        return None
    chosen = [numbers[name] for name in names]
    if chosen == list(range(len(index.shards))):
        return index
    ends = np.cumsum([shard.samples for shard in index.shards])
    blocks = []
    for new, old in enumerate(chosen):
        block = np.array(index.samples[ends[old] - index.shards[old].samples : ends[old]])
        block[:, 0] = new
        blocks.append(block)
    return Index(tuple(index.shards[old] for old in chosen), np.concatenate(blocks), index.keys, index.latents)


def refuse_unfinished(folder: Path) -> None:
    """Raises ``DataError`` if a preparation has begun in this folder and not come to its end, which is the index."""
    if (folder / INDEX).exists():
        return
    begun = (folder / PARTS).is_dir() and any(folder.glob("shards-*.tar"))
    with contextlib.suppress(OSError, ValueError, TypeError):  # others call their files settings.json too
        begun = begun or "keys_and_labels" in json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if begun:
        raise DataError(f"the preparation in {folder} is not finished; run the same diffmoe prepare again to finish it")


def _map(path: Path) -> np.ndarray:
    """An array of a file without pickles, mapped read-only; an empty one cannot be mapped."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if array.size else np.array(array)
