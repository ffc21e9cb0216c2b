"""Write a checkpoint while training goes on, so that it is either complete or not there.

At a step boundary every rank copies what it keeps into host memory (`CheckpointSaver.start`); a thread writes the
copy aside.  At a later boundary, when all ranks know that all are done, rank 0 adds the manifest, gives the directory
its name and switches ``latest`` (`CheckpointSaver.finish`).  The thread calls no collective: those are the loop's.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.layout import (
    BUFFER,
    FORMAT,
    LATEST,
    MANIFEST,
    META,
    checkpoint_name,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.checkpoint.retention import leave_newer, remove_surplus
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.checkpoint.verify import listed_sha256
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.distributed.collectives import all_gather, get_rank, get_world_size
from diffmoe_ds.distributed.consensus import raise_on_all_ranks, vote
from diffmoe_ds.distributed.fragments import Fragment
from diffmoe_ds.errors import CheckpointError, DiffMoEError
from diffmoe_ds.files import (
    TMP_PREFIX,
    Digest,
    atomic_write,
    remove_leftovers,
    remove_tree,
    rename_for_removal,
    write_error,
    write_json,
)


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
        self._tmp = self._final = self._root
        self._meta: dict[str, Any] = {}
        self._digest = Digest(0, "")
        self._failure: CheckpointError | None = None
        raise_on_all_ranks(device, self._remove_leftovers)

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
        rank = get_rank()
        self._final = self._root / checkpoint_name(meta["images"])
        self._tmp = self._root / f"{TMP_PREFIX}{self._final.name}"
        self._meta = {"format": FORMAT, "files": get_world_size(), **meta}
        tensors = {}
        for fragment, averaged in zip(fragments, ema, strict=True):
            if fragment.is_owner:
                kinds = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
                tensors.update({fragment_key(k, fragment.name, fragment.start): value for k, value in kinds.items()})
        if rank == 0:
            tensors.update({fragment_key(BUFFER, name, 0): value for name, value in buffers.items()})
        self._copy(tensors)
        self._failure, self._digest = None, Digest(0, "")
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
        digests = [Digest(size, _hex(words)) for size, *words in (row.tolist() for row in all_gather(mine))]
        if get_rank() == 0:
            self._attempt(lambda: self._complete(digests))
        self._agree()
        return self._final

    def _remove_leftovers(self) -> None:
        if get_rank() == 0 and self._root.is_dir():
            try:
                remove_leftovers(self._root)
            except OSError as error:
                raise write_error(self._root, error) from None

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

        path = self._tmp / rank_file(rank)

        def write() -> None:
            try:
                self._tmp.mkdir(parents=True, exist_ok=True)
                self._digest = write_safetensors(path, entries, {})
            except OSError as error:
                raise write_error(path, error) from None

        self._attempt(write)

    def _complete(self, digests: list[Digest]) -> None:
        """Rank 0: everything else of the checkpoint, its name, the switch, and what is now one too many."""
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        files[META] = write_json(self._tmp / META, self._meta)
        write_manifest(self._tmp, files)
        with atomic_write(self._root / LATEST) as pointer:
            pointer.write(f"{self._final.name}\n".encode())
            pointer.flush()
            os.fsync(pointer.fileno())  # everything that needs space is on the disk before the first rename
            replaced = None
            if self._final.exists():  # the same number of images again, after a resume from an older checkpoint
                replaced = rename_for_removal(self._final)
            self._tmp.rename(self._final)
        if replaced is not None:
            remove_tree(replaced, ignore_errors=True)
        try:
            left = leave_newer(self._root, self.images)
            if left:
                print(f"{'left':>11}  {', '.join(left)}: of a branch that this run left, or damaged", flush=True)
            remove_surplus(self._root, self._final.name, self._config)
        except OSError as error:  # this checkpoint is saved whatever becomes of the others
            print(f"*** WARNING: {self._root}: {error}; older checkpoints stay ***", file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Keep an error for the next vote instead of raising it."""
        try:
            action()
        except OSError as error:
            self._fail(str(write_error(self._tmp, error)))
        except CheckpointError as error:
            self._fail(str(error))
        except Exception as error:  # a thread would print it, and the run would go on
            self._fail(f"{self._tmp}: {type(error).__name__}: {error}.")

    def _fail(self, reason: str) -> None:
        where = f"rank {get_rank()} on {socket.gethostname()}"
        self._failure = CheckpointError(f"the checkpoint {self._final.name} was not saved: {where}: {reason}")

    def _agree(self) -> None:
        """If any rank failed, remove the incomplete checkpoint and raise on all ranks."""
        try:
            vote(self._device, self._failure)
        except DiffMoEError:
            if get_rank() == 0:
                remove_tree(self._tmp, ignore_errors=True)
            raise


def write_manifest(path: Path, files: dict[str, Digest]) -> None:
    """The last file of a checkpoint: what all others must be."""
    listed = {name: {"bytes": digest.size, "sha256": digest.sha256} for name, digest in files.items()}
    write_json(path / MANIFEST, {"files": listed, "sha256": listed_sha256(listed)})


def _words(sha256: str) -> list[int]:
    """A checksum as four signed 64-bit numbers, which a collective can carry."""
    data = bytes.fromhex(sha256)
    return [int.from_bytes(data[start : start + 8], "big", signed=True) for start in range(0, 32, 8)]


def _hex(words: list[int]) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words).hex()
