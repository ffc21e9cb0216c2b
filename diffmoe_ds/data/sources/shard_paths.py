"""Find the shards that a path names and their index: next to them, cached, or built by scanning."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import braceexpand

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.data.sources.cache import ShardCache, locked
from diffmoe_ds.data.sources.index_files import (
    INDEX,
    array_names,
    listed,
    load_index,
    refuse_unfinished,
    save_index,
    subset,
)
from diffmoe_ds.data.sources.remote import fetch, is_url
from diffmoe_ds.data.sources.tar_index import Index
from diffmoe_ds.errors import CheckpointError, DataError
from diffmoe_ds.files import expand_user, replacing

MAX_SHARDS = 1 << 18
"""Most shards of a pattern with braces."""
MAX_BRACES = 16
"""Most pairs of braces in a pattern."""
RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
"""Start of a range of numbers in braces."""
GZIP_MAGIC = b"\x1f\x8b"
KEEP_INDEX_FROM_BYTES = 1 << 30
"""Bytes of shards without an index from which the scanned one is cached next to them."""


def expand(path: str | Path) -> list[str]:
    """Return the shards that a path names: a file, the `*.tar` and `*.tar.gz` of a directory, a pattern, or URLs.

    A pattern has braces (`shards-{000..127}.tar`), wildcards (`shards-*.tar`) or both; a URL or a `pipe:` has braces
    only.  The shards of a directory and of a wildcard are sorted by name; those of braces keep their order.  The shards
    of a directory include those in its index, so that reading a lost one fails.

    Raises:
        DataError: the path does not exist, or part of the pattern matches nothing.
    """
    try:
        if is_url(str(path)):
            return _braces(str(path))
        whole = expand_user(path)
        if whole.is_dir():
            names = {p.name for p in whole.iterdir() if is_shard(p.name)}
            if not names:
                raise DataError(f"directory {path} holds no shards; expected files named *.tar or *.tar.gz")
            return sorted(os.path.join(whole, name) for name in names.union(listed(whole)))
        if whole.exists():
            return [str(whole)]
        shards = []
        for pattern in _braces(str(whole)):
            matches = sorted(glob.glob(pattern))
            if not matches:
                raise DataError(f"no shard {pattern} exists; expected a file, a directory or a pattern of tar files")
            shards += matches
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]
        raise DataError(f"pattern {path} has unbalanced braces; write it like shards-{{000..127}}.tar") from None
    return shards


def _braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern.

    Raises:
        DataError: it names more than `MAX_SHARDS`, or has more than `MAX_BRACES`.
        braceexpand.UnbalancedBracesError: a brace is missing.
    """
    # Before they are expanded, which takes time and memory for all numbers.
    sizes = (abs(float(last) - float(first)) + 1 for first, last in RANGE.findall(pattern))
    names = []
    if math.prod(sizes) <= MAX_SHARDS and pattern.count("{") <= MAX_BRACES:
        names = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
    if not 0 < len(names) <= MAX_SHARDS:
        raise DataError(f"pattern {pattern} names more than {MAX_SHARDS:,} shards or has more than {MAX_BRACES} braces")
    return names


def open_index(shards: Sequence[str], cache: ShardCache, scan: Callable[[], Index]) -> Index:
    """Return the index next to shards, or else the one that `scan` returns, which is kept if scanning takes long.

    Raises:
        DataError: the index is damaged, or a shard has another size than the index says.
    """
    found = prepared_index(shards, cache)
    if found is not None:
        _check_sizes(shards, found)
        return found
    local = [shard for shard in shards if not is_url(shard)]
    if local != list(shards):
        folder: Path | None = cache.folder
    else:
        folder = Path(local[0]).parent if sum(map(shard_size, local)) >= KEEP_INDEX_FROM_BYTES else None
    if any(map(is_gzip, local)):
        folder = None  # they are decompressed at every start anyway
    return kept_index(folder, shards, scan)


def _check_sizes(shards: Sequence[str], index: Index) -> None:
    for shard, info in zip(shards, index.shards, strict=True):
        if not is_url(shard) and (size := shard_size(shard)) != info.bytes:
            raise DataError(
                f"shard {shard} has {size} bytes, but its index says {info.bytes}: it has changed; "
                "run diffmoe prepare check to verify the dataset"
            )


def prepared_index(shards: Sequence[str], cache: ShardCache) -> Index | None:
    """Return the index next to the shards, if they are all in one place and it lists all of them.

    Raises:
        DataError: the index is damaged, or the shards belong to an unfinished preparation.
    """
    for parent in {os.path.dirname(shard) for shard in shards if not is_url(shard)}:
        refuse_unfinished(Path(parent))
    if any(shard.startswith("pipe:") for shard in shards):
        return None
    places = {shard.rpartition("/")[0] for shard in shards}
    place = places.pop()
    if places:
        return None
    names = [shard.rpartition("/")[2] for shard in shards]
    if not is_url(shards[0]):
        folder = Path(shards[0]).parent
        return subset(load_index(folder), names) if (folder / INDEX).is_file() else None
    folder = cache.folder / f"index-{hashlib.sha256(place.encode()).hexdigest()[:32]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not (folder / INDEX).exists():
                with replacing(folder / INDEX) as tmp:  # appears last
                    fetch(f"{place}/{INDEX}", tmp)
                    for name in array_names(tmp):
                        with replacing(folder / name) as array:
                            fetch(f"{place}/{name}", array)
    except (DataError, OSError):
        return None  # most datasets have none, so their headers are read
    return subset(load_index(folder), names)


def kept_index(folder: Path | None, shards: Sequence[str], make: Callable[[], Index]) -> Index:
    """Return what `make` returns, cached in `folder` under the names, sizes and modification times of the shards."""
    if folder is None:
        return make()
    facts = [(s, 0, 0) if is_url(s) else (Path(s).name, shard_size(s), os.stat(s).st_mtime_ns) for s in shards]
    kept = folder / f".diffmoe-index-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with locked(kept / ".lock"):  # only one rank per host reads the headers
            if (kept / INDEX).exists():
                with contextlib.suppress(DataError):  # damaged: it is only a copy
                    found = load_index(kept)
                    if len(found.shards) == len(shards):
                        return found
            index = make()
            with contextlib.suppress(CheckpointError):  # a full disk
                save_index(index, kept)
            return index
    except OSError:  # a read-only file system
        return make()


def shard_size(shard: str) -> int:
    """Return the bytes of a local shard.

    Raises:
        DataError: it does not exist.
    """
    try:
        return os.stat(shard).st_size
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror}") from None


def why_not_shards(path: str) -> str | None:
    """Return why a path cannot name shards, before they are opened; None if it may, or if it is a folder or pattern."""
    file = expand_user(path)
    if is_url(path) or is_shard(path) or file.is_dir() or any(character in path for character in "*?[{"):
        return None
    try:
        with open_regular(file) as opened:
            start = opened.read(2)
            opened.seek(0)
            header = (gzip.GzipFile(fileobj=opened) if start == GZIP_MAGIC else opened).read(tarfile.BLOCKSIZE)
        tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except FileNotFoundError:
        return "does not exist"
    except tarfile.HeaderError:
        return "is not a tar file"
    except (OSError, EOFError, zlib.error):  # described when it is opened
        return None
    return None


def is_shard(name: str) -> bool:
    """Return whether a file name is that of a shard."""
    return name.endswith((".tar", ".tar.gz"))


def is_gzip(shard: str) -> bool:
    """Return whether a local file starts with gzip's magic number."""
    with contextlib.suppress(OSError), open_regular(shard) as file:
        return file.read(2) == GZIP_MAGIC
    return False
