"""Shards behind URLs: fetched whole into a folder of this host, once for all its ranks and workers.

The URLs are WebDataset's and are opened by its ``gopen``: ``http(s)://``, ``pipe:COMMAND``, ``gs://``, ``ais://``,
``hf://`` and others; for S3 write ``pipe:aws s3 cp s3://bucket/shard.tar -``.  The folder has a size; the shards that
were used least recently make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import importlib
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import replacing

DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffmoe-ds"
CHUNK = 1 << 20


def is_url(path: str) -> bool:
    """Whether WebDataset would fetch this instead of opening a file."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", path) is not None


class ShardCache:
    """Fetched shards in ``folder``, of ``limit`` bytes together unless a single one is larger.

    Processes of a host may share the folder.  A shard that was compressed with gzip is stored unpacked.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder.expanduser()
        self.limit = limit
        self._prefetching: threading.Thread | None = None

    def open(self, url: str, size: int | None = None) -> int:
        """A file descriptor for reading; the caller closes it, and it stays valid if the shard is removed.

        A kept shard that has not ``size`` bytes is fetched again.

        Raises ``DataError`` if the URL cannot be fetched to its end.
        """
        target = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return self._open(target, size)
            with locked(target.with_suffix(".lock")):  # another process may have fetched it while this one waited
                with contextlib.suppress(FileNotFoundError):
                    return self._open(target, size)
                descriptor = self._fetch(url, target)
            self._make_room(target)
        except OSError as error:
            raise DataError(f"the shard cache {self.folder} cannot be written: {error.strerror}") from None
        return descriptor

    def prefetch(self, urls: Iterable[str]) -> None:
        """Fetch in the background what is not there yet; nothing if that is still going on for earlier ones."""
        if self._prefetching is not None and self._prefetching.is_alive():
            return
        self._prefetching = threading.Thread(target=self._prefetch, args=(list(urls),), daemon=True)
        self._prefetching.start()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_prefetching": None}

    def _prefetch(self, urls: list[str]) -> None:
        with contextlib.suppress(DataError):  # whoever needs the shard meets the same error and reports it
            for url in urls:
                os.close(self.open(url))

    def _open(self, path: Path, size: int | None = None) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        if size not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            raise FileNotFoundError(f"{path} is another shard of that URL")
        # The time of use; that of change stays, by which readers notice that a shard is another.
        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
        return descriptor

    def _fetch(self, url: str, target: Path) -> int:
        with replacing(target) as tmp:
            fetch(url, tmp)
            with open(tmp, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
            if packed:
                self._unpack(url, tmp)
            descriptor = self._open(tmp)  # once renamed, another process may remove it at any time
        return descriptor

    def _unpack(self, url: str, path: Path) -> None:
        try:
            with replacing(path) as tmp, gzip.open(path) as source, open(tmp, "wb") as file:
                while chunk := source.read(CHUNK):
                    file.write(chunk)
                    if file.tell() > self.limit:
                        raise DataError(f"shard {url} unpacks to more than the cache holds, {self.limit / 1e9:g} GB")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"shard {url} is not a complete gzip file: {error}") from None

    def _make_room(self, keep: Path) -> None:
        shards = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                status = path.stat()
                shards.append((status.st_atime_ns, status.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total > self.limit and path != keep:
                path.unlink(missing_ok=True)  # readers keep what they have open
                total -= size


def shard_cache(data: DataConfig) -> ShardCache:
    """The cache that a recipe's ``data`` section describes."""
    return ShardCache(DEFAULT_FOLDER if data.cache_dir is None else Path(data.cache_dir), int(data.cache_gb * 1e9))


def fetch(url: str, target: Path) -> None:
    """Write what a URL gives into a file; raises ``DataError`` if it cannot be opened or breaks off."""
    # The package's own `gopen` is the function, which hides the module of that name.
    gopen = importlib.import_module("webdataset.gopen").gopen
    try:
        with gopen(url, "rb") as stream, open(target, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
    except Exception as error:  # what a scheme's client raises depends on the scheme
        raise DataError(f"shard {url} cannot be fetched: {' '.join(str(error).split())[:300]}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; it is released when the process ends, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
