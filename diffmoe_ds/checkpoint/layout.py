"""Files and names of a checkpoint on disk.

    checkpoints/
      latest                          name of the newest complete checkpoint
      images_000000040000/
        meta.json                     format, configuration, images, step, shapes of all tensors
        rank_00000.safetensors ...    fragments of each rank
        manifest.json                 size and SHA-256 of every other file; written last
      images_000000060000_2/          the second one at this number of images: no name is reused
      left-images_000000060000/       a checkpoint of an abandoned branch of the run, or a damaged one

A fragment is a contiguous piece of a flattened logical tensor (all experts together), stored under the key
``<kind>/<name>@<first element>``.  No file depends on the number of ranks that wrote it or on the ZeRO stage: a reader
asks for any range of a tensor and gets it from the files that hold it.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

FORMAT = 1
"""Number of the format described here; increased when readers of the previous one cannot read the new one."""
KINDS = ("fp32", "exp_avg", "exp_avg_sq", "ema")
"""Master weights, moments (Lion has only the first), averaged weights."""
BUFFER = "buffer"
"""Kind of the tensors that are replicated on every rank: the thresholds."""
META = "meta.json"
MANIFEST = "manifest.json"
LATEST = "latest"
LEFT = "left-"
"""Prefix of checkpoints that their run passed over when it continued from an older one; no run uses them again."""
RESOLVED_RECIPE = "resolved.yaml"
"""File of a run directory: its whole configuration, a valid recipe."""


def checkpoint_root(run_directory: Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return run_directory / "checkpoints"


def default_directory(recipe: str | PathLike[str]) -> Path:
    """Return the run directory of a recipe: ``runs/NAME``, or for the ``resolved.yaml`` of a run, that run's."""
    path = Path(recipe)
    if path.name == RESOLVED_RECIPE and checkpoint_root(path.parent).is_dir():
        return path.parent
    return Path("runs") / path.stem


def checkpoint_name(images: int, number: int = 1) -> str:
    """Return the directory name of a checkpoint.

    Args:
        images: images that the run has seen.
        number: 1 for the first checkpoint at this number of images, 2 for the second, and so on.
    """
    return f"images_{images:012d}" + (f"_{number}" if number > 1 else "")


def checkpoint_order(name: str) -> tuple[int, int] | None:
    """Return the two arguments of `checkpoint_name`, which order checkpoints by age; None for any other name."""
    match = re.fullmatch(r"images_(\d{12,18})(?:_([2-9]|[1-9]\d{1,8}))?", name, re.ASCII)
    return (int(match[1]), int(match[2] or 1)) if match else None


def checkpoint_images(name: str) -> int | None:
    """Return the images of a checkpoint's directory name, or None for any other name."""
    order = checkpoint_order(name)
    return None if order is None else order[0]


def rank_file(rank: int) -> str:
    """Return the file name of a rank's fragments."""
    return f"rank_{rank:05d}.safetensors"


def fragment_key(kind: str, name: str, start: int) -> str:
    """Return the key of a fragment in its file."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """Split the key of a fragment into kind, name and start.

    Raises:
        ValueError: it is not such a key.
    """
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    if not (start.isdecimal() and start.isascii() and len(start) <= 18):
        raise ValueError(f"{key[:80]!r} is not KIND/NAME@START")
    return kind, name, int(start)
