"""Damage to checkpoints, and edits that a person could make."""

from __future__ import annotations

import json
from pathlib import Path

from diffmoe_ds.checkpoint.layout import META
from diffmoe_ds.checkpoint.metadata import read_manifest, write_manifest
from diffmoe_ds.files import Digest, sha256_of


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(data)


def reseal(path: Path, meta: dict | None = None) -> None:
    """Write a manifest for changed contents, as a person who edits a checkpoint could."""
    if meta is not None:
        (path / META).write_text(json.dumps(meta))
    digests = {name: (file.stat().st_size, sha256_of(file)) for name in read_manifest(path) for file in [path / name]}
    write_manifest(path, {name: Digest(*digest) for name, digest in digests.items()})
