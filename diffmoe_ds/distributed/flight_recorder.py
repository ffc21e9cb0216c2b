"""NCCL's flight recorder: torch keeps the last collectives of each rank in memory, and a hang leaves them in files.

torch itself writes the files when a collective times out, but the watchdog usually ends the process earlier, and then
writes them. ``torchfrtrace --prefix rank_ FOLDER`` compares the ranks and names the collective that did not match.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Names of the variable with the number of collectives to keep; 0 switches the recorder off."""
DEFAULTS = {
    SIZE: "2000",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
"""Names of a variable, the current one first, and its value unless the user has set one of them."""
FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Names of the variable with the first part of the files' paths, to which torch appends the rank."""
PREFIX = "rank_"
"""First part of the files' names."""


def enable(folder: Path, world: int) -> None:
    """Record collectives, and let torch write them into a folder, as far as the user has not set its variables.

    Call this before the first process group of NCCL is created.

    Args:
        folder: folder on a file system that all ranks share; created unless the user has chosen another place.  Files
            of ranks that this run does not have are removed from it, because they would be compared with its own.
        world: number of ranks.
    """
    for names, value in (*DEFAULTS.items(), (FILES, str(folder / PREFIX))):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
            if names is FILES:
                with suppress(OSError):  # the disk may be full: training does not need the folder
                    folder.mkdir(parents=True, exist_ok=True)
                    for path in folder.glob(f"{PREFIX}*"):
                        rank = path.name.removeprefix(PREFIX)
                        if rank.isdecimal() and int(rank) >= world:
                            path.unlink(missing_ok=True)


def path(rank: int) -> str:
    """Return the path of a rank's file; empty without NCCL, or if the user has switched the recorder off."""
    prefix, size = (next((os.environ[name] for name in names if name in os.environ), "") for names in (FILES, SIZE))
    return f"{prefix}{rank}" if prefix and size.strip() != "0" and dist.is_nccl_available() else ""


def dump(rank: int) -> None:
    """Write the last collectives of this process to the file at `path`, if it uses NCCL. May block on a hung disk."""
    if target := path(rank):
        with suppress(OSError):
            Path(target).write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
