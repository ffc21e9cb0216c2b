"""What a checkpoint looks like on disk.

    checkpoints/
      latest                          the name of the newest complete checkpoint
      images_000040000/
        meta.json                     format, configuration, images, step, shapes of all tensors
        rank_00000.safetensors ...    each rank's fragments
        manifest.json                 size and SHA-256 of every other file; written last
      left-images_000060000/          a checkpoint of a branch that the run left, or a damaged one

A fragment is a contiguous piece of a flattened logical tensor (all experts together), stored under
``<kind>/<name>@<first element>``.  Nothing in a file depends on how many ranks wrote it or on the ZeRO stage: a
reader asks for any range of a tensor and gets it from whichever files hold it.
"""

from __future__ import annotations

import re
from pathlib import Path

FORMAT = 1
"""Number of the layout described here; raised when a reader of the old one could not read the new one."""
KINDS = ("fp32", "exp_avg", "exp_avg_sq", "ema")
"""Master weights, Adam's moments, averaged weights."""
BUFFER = "buffer"
"""Kind of the tensors that every rank holds whole: the thresholds."""
META = "meta.json"
MANIFEST = "manifest.json"
LATEST = "latest"
LEFT = "left-"
"""Begins the name of a checkpoint that its run passed over when it continued an older one; no run looks at it again."""


def checkpoint_root(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def checkpoint_name(images: int) -> str:
    """Directory name of the checkpoint after so many images; names sort like the numbers."""
    return f"images_{images:012d}"


def checkpoint_images(name: str) -> int | None:
    """Images of a checkpoint's directory name; none if it is no such name."""
    match = re.fullmatch(r"images_(\d{12,18})", name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    """File name of a rank's fragments."""
    return f"rank_{rank:05d}.safetensors"


def fragment_key(kind: str, name: str, start: int) -> str:
    """Key of a fragment in its file."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """(kind, name, start) of a fragment's key; ValueError if it is not one."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return kind, name, int(start)
