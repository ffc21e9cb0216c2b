"""Write a checkpoint so that it is either complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from diffmoe_ds.checkpoint.layout import (
    BUFFER,
    FORMAT,
    checkpoint_name,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.parallel.deepspeed_seam import Fragment


def save_checkpoint(
    run_directory: Path,
    fragments: list[Fragment],
    ema: list[Tensor],
    buffers: dict[str, Tensor],
    meta: dict[str, Any],
) -> Path:
    """Write every rank's fragments aside, then switch ``latest``; all ranks must call.

    Args:
        run_directory: the run's directory, on a file system that all ranks see.
        fragments: what this rank keeps.
        ema: the averaged weights of each fragment.
        buffers: whole tensors that are the same on all ranks.
        meta: what `CheckpointReader.meta` shall hold; ``images`` names the checkpoint.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: some rank could not write; no trace is left and earlier checkpoints are as they were.
    """
    root = checkpoint_root(run_directory)
    final = root / checkpoint_name(meta["images"])
    aside = root / f".writing-{final.name}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        _together(lambda: aside.mkdir(parents=True), aside)
    else:
        _together(lambda: None, aside)
    _together(lambda: _write_rank(aside / rank_file(rank), fragments, ema, buffers if rank == 0 else {}), aside)
    _together(lambda: _finish(aside, final, root, meta) if rank == 0 else None, aside)
    return final


def _write_rank(path: Path, fragments: list[Fragment], ema: list[Tensor], buffers: dict[str, Tensor]) -> None:
    tensors = {}
    for fragment, averaged in zip(fragments, ema, strict=True):
        if fragment.is_owner:
            kinds = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
            for kind, value in kinds.items():
                tensors[fragment_key(kind, fragment.name, fragment.start)] = value.detach().cpu().clone()
    for name, value in buffers.items():
        tensors[fragment_key(BUFFER, name, 0)] = value.detach().cpu().flatten().clone()
    save_file(tensors, path)
    _sync(path)


def _finish(aside: Path, final: Path, root: Path, meta: dict[str, Any]) -> None:
    content = {"format": FORMAT, "files": dist.get_world_size(), **meta}
    (aside / "meta.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(aside / "meta.json")
    _sync(aside)
    if final.exists():  # the same number of images again, after a resume from an older checkpoint
        shutil.rmtree(final)
    aside.rename(final)
    pointer = root / ".writing-latest"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _sync(pointer)
    pointer.rename(root / "latest")
    _sync(root)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _together(action: Any, aside: Path) -> None:
    """Do something on this rank; if any rank fails, all raise and rank 0 removes what was written aside."""
    failure = ""
    try:
        action()
    except OSError as error:
        failure = f"{error.filename or aside}: {error.strerror}"
    except Exception as error:  # safetensors wraps the system's error in one of its own
        failure = f"{aside}: {error}"
    failed = torch.tensor([bool(failure)], dtype=torch.int32, device=_device())
    dist.all_reduce(failed)
    if failed.item():
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"the checkpoint was not saved: {failure or 'another rank could not write its part'}.")


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
