"""Cache for shards behind URLs: each is downloaded once per host, for all ranks and workers.

The cache folder has a size limit; the least recently used shards are deleted to make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.control_files import open_descriptor
from diffmoe_ds.data.sources.compressed import decompress
from diffmoe_ds.data.sources.remote import fetch
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import expand_user, replacing

DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffmoe-ds"


class ShardCache:
    """Downloaded shards in a folder that the processes of a host may share.

    A shard that is compressed with gzip is stored decompressed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Describe the cache; the folder is created by the first download.

        Args:
            folder: where the shards are kept.
            limit: bytes of all shards together.  A single shard may be larger.
        """
        self.folder = expand_user(folder)
        self.limit = limit
        self._prefetching: threading.Thread | None = None

    def open(self, url: str, size: int | None = None) -> int:
        """Open a shard for reading; download it if it is not in the cache.

        Args:
            url: the shard.
            size: its bytes according to an index.  A cached shard of another size is downloaded again.

        Returns:
            A file descriptor, which the caller closes.  It stays valid if the shard is deleted from the cache.

        Raises:
            DataError: the download failed, or the folder cannot be written.
        """
        target = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return self._open(target, size)
            with locked(target.with_suffix(".lock")):  # another process may download it while this one waits
                with contextlib.suppress(FileNotFoundError):
                    return self._open(target, size)
                descriptor = self._fetch(url, target)
            self._make_room(target)
        except OSError as error:
            raise DataError(f"the shard cache {self.folder} cannot be written: {error.strerror}") from None
        return descriptor

    def prefetch(self, urls: Iterable[str]) -> None:
        """Start downloading missing shards in the background, unless an earlier prefetch is still running."""
        if self._prefetching is not None and self._prefetching.is_alive():
            return
        self._prefetching = threading.Thread(target=self._prefetch, args=(list(urls),), daemon=True)
        self._prefetching.start()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetching": None}

    def _prefetch(self, urls: list[str]) -> None:
        with contextlib.suppress(DataError):  # the reader that needs the shard gets the same error and reports it
            for url in urls:
                os.close(self.open(url))

    def _open(self, path: Path, size: int | None = None) -> int:
        descriptor = open_descriptor(path)
        if size not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            raise FileNotFoundError(f"{path} differs in size from the index")
        # Update the access time only: a new modification time tells readers that the shard has changed.
        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
        return descriptor

    def _fetch(self, url: str, target: Path) -> int:
        with replacing(target) as tmp:
            fetch(url, tmp)
            with open(tmp, "rb") as file:
                compressed = file.read(2) == b"\x1f\x8b"
            if compressed:
                self._decompress(url, tmp)
            descriptor = self._open(tmp)  # opened first: once renamed, another process may delete it to make room
        return descriptor

    def _decompress(self, url: str, path: Path) -> None:
        try:
            with replacing(path) as tmp, open(path, "rb") as source, open(tmp, "xb") as file:
                for chunk in decompress(url, source):
                    file.write(chunk)
                    if file.tell() > self.limit:
                        raise DataError(
                            f"shard {url} is larger than the cache when decompressed, {self.limit / 1e9:g} GB"
                        )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"shard {url} is not a complete gzip file: {error}") from None

    def _make_room(self, keep: Path) -> None:
        shards = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process may be making room too
                status = path.stat()
                shards.append((status.st_atime_ns, status.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total > self.limit and path != keep:
                path.unlink(missing_ok=True)  # readers keep the files that they have open
                total -= size


def shard_cache(data: DataConfig) -> ShardCache:
    """Return the cache that the `data` section of a recipe describes."""
    return ShardCache(DEFAULT_FOLDER if data.cache_dir is None else Path(data.cache_dir), int(data.cache_gb * 1e9))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file.  The kernel releases it when the process ends, even if it is killed."""
    # Neither follows a link nor waits for the reader of a named pipe.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
