"""Write a checkpoint while training goes on, so that it is either complete or not there.

At a step boundary every rank copies what it keeps into host memory (`CheckpointSaver.start`); a thread writes the
copy aside.  At a later boundary, when all ranks know that all are done, rank 0 adds the manifest, gives the directory
its name and switches ``latest`` (`CheckpointSaver.finish`).  The thread calls no collective: those are the loop's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.checkpoint.layout import (
    BUFFER,
    FORMAT,
    LATEST,
    MANIFEST,
    META,
    REMOVING,
    WRITING,
    checkpoint_name,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.checkpoint.retention import leave_newer, remove_surplus
from diffmoe_ds.checkpoint.stream import Digest, Entry, sync_directory, write_safetensors, write_text
from diffmoe_ds.checkpoint.verify import listed_sha256
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.distributed.deepspeed_seam import Fragment
from diffmoe_ds.errors import CheckpointError

POINTER_ASIDE = f"{WRITING}{LATEST}"
MAX_REASON_BYTES = 8192
"""Of what a rank that could not write tells the others; a path alone may have 4096."""


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time.  Every rank has one; `start` and `finish` are collectives."""

    def __init__(self, run_directory: Path, config: CheckpointConfig, device: torch.device) -> None:
        """Remove what an earlier run of this directory left half-written.

        Args:
            run_directory: on a file system that all ranks see.
            config: what is kept.
            device: where this rank's collectives take their tensors.
        """
        self._root = checkpoint_root(run_directory)
        self._config = config
        self._device = device
        self._host: dict[str, Tensor] = {}  # the copies, made at the first save and used again
        self._thread: threading.Thread | None = None
        self._aside = self._final = self._root
        self._meta: dict[str, Any] = {}
        self._digest = Digest(0, "")
        self._failure = ""
        if dist.get_rank() == 0 and self._root.is_dir():
            for left in self._root.iterdir():
                if left.name.startswith((WRITING, REMOVING)):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint was started and not finished; the same on all ranks."""
        return self._thread is not None

    @property
    def images(self) -> int:
        """Images of the checkpoint that was started last."""
        return self._meta["images"]

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, fragments: list[Fragment], ema: list[Tensor], buffers: dict[str, Tensor], meta: dict[str, Any]
    ) -> None:
        """Copy everything and begin to write; training may change the tensors as soon as this returns.

        Args:
            fragments: what this rank keeps.
            ema: the averaged weights of each fragment.
            buffers: whole tensors that are the same on all ranks.
            meta: what `CheckpointReader.meta` shall hold; ``images`` names the checkpoint.
        """
        assert not self.is_open, "finish() the last checkpoint first"
        rank = dist.get_rank()
        self._final = self._root / checkpoint_name(meta["images"])
        self._aside = self._root / f"{WRITING}{self._final.name}"
        self._meta = {"format": FORMAT, "files": dist.get_world_size(), **meta}
        tensors = {}
        for fragment, averaged in zip(fragments, ema, strict=True):
            if fragment.is_owner:
                kinds = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
                tensors.update({fragment_key(k, fragment.name, fragment.start): value for k, value in kinds.items()})
        if rank == 0:
            tensors.update({fragment_key(BUFFER, name, 0): value for name, value in buffers.items()})
        self._copy(tensors)
        self._failure, self._digest = "", Digest(0, "")
        self._thread = threading.Thread(target=self._write, args=(rank,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> Path:
        """Wait for this rank's thread and complete the checkpoint; every rank must call.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: some rank could not write; no trace is left and earlier checkpoints are as they were.
        """
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        self._agree()
        mine = torch.tensor([self._digest.size, *_words(self._digest.sha256)], dtype=torch.int64, device=self._device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        if dist.get_rank() == 0:
            self._attempt(lambda: self._complete([Digest(row[0], _hex(row[1:])) for row in map(Tensor.tolist, every)]))
        self._agree()
        return self._final

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key not in self._host:
                self._host[key] = torch.empty(value.numel(), dtype=torch.float32, pin_memory=value.is_cuda)
            self._host[key].copy_(value.detach().flatten(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, rank: int) -> None:
        """The thread: this rank's file."""
        entries = [Entry(key, (len(value),), value.dtype, [value]) for key, value in self._host.items()]

        def write() -> None:
            self._aside.mkdir(parents=True, exist_ok=True)
            self._digest = write_safetensors(self._aside / rank_file(rank), entries, {})

        self._attempt(write)

    def _complete(self, digests: list[Digest]) -> None:
        """Rank 0: everything else of the checkpoint, its name, the switch, and what is now one too many."""
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        files[META] = write_text(self._aside / META, json.dumps(self._meta, indent=1))
        write_manifest(self._aside, files)
        pointer = self._root / POINTER_ASIDE
        write_text(pointer, self._final.name + "\n")  # before the names change: all that takes space is on the disk
        if self._final.exists():  # the same number of images again, after a resume from an older checkpoint
            old = self._root / f"{REMOVING}{self._final.name}"
            self._final.rename(old)
            self._aside.rename(self._final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self._aside.rename(self._final)
        pointer.rename(self._root / LATEST)
        sync_directory(self._root)
        try:
            left = leave_newer(self._root, self.images)
            if left:
                print(f"{'left':>11}  {', '.join(left)}: of a branch that this run left, or damaged", flush=True)
            remove_surplus(self._root, self._final.name, self._config)
        except OSError as error:  # this checkpoint is saved whatever becomes of the others
            print(f"*** WARNING: {self._root}: {error}; older checkpoints stay ***", file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._failure = f"{error.filename or self._aside}: {error.strerror}"
        except Exception as error:  # in a thread it would be printed and lost
            self._failure = f"{self._aside}: {type(error).__name__}: {error}"

    def _agree(self) -> None:
        """If any rank failed, remove what was written aside and raise on all, with the words of the first that did."""
        rank, world = dist.get_rank(), dist.get_world_size()
        first = torch.tensor(rank if self._failure else world, dtype=torch.int32, device=self._device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == world:
            return
        if rank == 0:
            shutil.rmtree(self._aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                (self._root / POINTER_ASIDE).unlink()
        why = f"rank {rank} on {socket.gethostname()}: {self._failure}".encode()[:MAX_REASON_BYTES]
        text = torch.tensor(list(why.ljust(MAX_REASON_BYTES)), dtype=torch.uint8, device=self._device)
        dist.broadcast(text, src=int(first))
        why = bytes(text.tolist()).decode(errors="replace").rstrip()
        raise CheckpointError(f"the checkpoint {self._final.name} was not saved: {why}.")


def write_manifest(path: Path, files: dict[str, Digest]) -> None:
    """The last file of a checkpoint: what all others must be."""
    listed = {name: {"bytes": digest.size, "sha256": digest.sha256} for name, digest in files.items()}
    write_text(path / MANIFEST, json.dumps({"files": listed, "sha256": listed_sha256(listed)}, indent=1))
    sync_directory(path)


def _words(sha256: str) -> list[int]:
    """A checksum as four signed 64-bit numbers, which a collective can carry."""
    data = bytes.fromhex(sha256)
    return [int.from_bytes(data[start : start + 8], "big", signed=True) for start in range(0, 32, 8)]


def _hex(words: list[int]) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words).hex()
