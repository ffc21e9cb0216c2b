"""Files that are whole or not there, and tar files whose bytes depend on their contents alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffmoe_ds.errors import CheckpointError

ASIDE = ".writing-"
"""What the name of an unfinished file begins with."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on the disk; raises ``CheckpointError`` if it cannot be."""
    aside = path.with_name(f"{ASIDE}{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with open(aside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json(path: Path, tree: Any) -> None:
    """Plain data as a whole file."""
    with whole_file(path) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar file of (name, contents): no time, user or mode of this machine goes into it."""
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(data))


def sha256_of(path: Path) -> str:
    """Of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
