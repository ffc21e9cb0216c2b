"""An untrained model, damage to checkpoints, and edits that a person could make."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import write_model
from diffmoe_ds.checkpoint.layout import META
from diffmoe_ds.checkpoint.metadata import read_manifest, write_manifest
from diffmoe_ds.checkpoint.stream import Entry
from diffmoe_ds.config.load import load_config
from diffmoe_ds.files import Digest, sha256_of
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights


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


def export_untrained(folder: Path) -> Path:
    """Export a small untrained model of 32x32 gray images."""
    model = DiT(load_config("fashion", ["model.name=nano-E4", "model.patch_size=8"]))
    init_weights(model, 0, 0)
    entries = [Entry(name, tuple(t.shape), torch.float32, [t]) for name, t in model.state_dict().items()]
    write_model(folder, entries, Description(model.config), "ema", images=16)
    return folder
