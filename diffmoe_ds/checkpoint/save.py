"""Save checkpoints atomically while training continues.

At a step boundary every rank copies its state into host memory (`CheckpointSaver.start`), and a thread writes the copy
into a temporary directory.  At a later boundary, when all ranks know that all threads are done, rank 0 adds metadata
and manifest, renames the directory and switches ``latest`` (`CheckpointSaver.finish`).  The thread calls no collective:
collectives belong to the training loop.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.layout import (
    BUFFER,
    LATEST,
    META,
    checkpoint_name,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, write_manifest
from diffmoe_ds.checkpoint.retention import leave_newer, remove_surplus
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
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
    """Saves the checkpoints of one run, one at a time.

    Every rank has one, and all ranks must construct it, `start` and `finish` together.
    """

    def __init__(self, run_directory: Path, config: CheckpointConfig, device: torch.device) -> None:
        """Remove incomplete checkpoints of an earlier run in this directory.

        Args:
            run_directory: on a file system that all ranks share.
            config: how many checkpoints are kept.
            device: where the process group's tensors live.

        Raises:
            CheckpointError: on all ranks, if the leftovers cannot be removed.
        """
        self._root = checkpoint_root(run_directory)
        self._config = config
        self._device = device
        self._host: dict[str, Tensor] = {}  # the copies, allocated by the first save and reused
        self._thread: threading.Thread | None = None
        self._tmp = self._final = self._root
        self._metadata: CheckpointMetadata | None = None
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
        assert self._metadata is not None, "start() a checkpoint first"
        return self._metadata.images

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        fragments: Sequence[Fragment],
        ema: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
        metadata: CheckpointMetadata,
    ) -> None:
        """Copy the state and start writing; training may change the tensors as soon as this returns.

        Args:
            fragments: the fragments of this rank.
            ema: the averaged weights of each fragment.
            buffers: tensors that are replicated on all ranks.
            metadata: everything else; `CheckpointMetadata.files` is set here.
        """
        assert not self.is_open, "finish() the last checkpoint first"
        self._metadata = replace(metadata, files=get_world_size())
        self._final = self._root / checkpoint_name(metadata.images)
        self._tmp = self._root / f"{TMP_PREFIX}{self._final.name}"
        tensors = {}
        for fragment, averaged in zip(fragments, ema, strict=True):
            if fragment.is_owner:
                kinds = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
                tensors.update({fragment_key(k, fragment.name, fragment.start): value for k, value in kinds.items()})
        if get_rank() == 0:
            tensors.update({fragment_key(BUFFER, name, 0): value for name, value in buffers.items()})
        self._copy(tensors)
        self._failure, self._digest = None, Digest(0, "")
        path = self._tmp / rank_file(get_rank())
        self._thread = threading.Thread(
            target=self._attempt, args=(lambda: self._write(path),), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> Path:
        """Wait for this rank's thread and complete the checkpoint.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: on all ranks, if one could not write; nothing of the checkpoint is left, and earlier ones
                are unchanged.
        """
        assert self._thread is not None, "start() a checkpoint first"
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

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key not in self._host:
                self._host[key] = torch.empty(value.numel(), dtype=torch.float32, pin_memory=value.is_cuda)
            self._host[key].copy_(value.detach().flatten(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, path: Path) -> None:
        """Write this rank's file; runs in the thread."""
        entries = [Entry(key, (len(value),), value.dtype, [value]) for key, value in self._host.items()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._digest = write_safetensors(path, entries, {})
        except OSError as error:
            raise write_error(path, error) from None

    def _complete(self, digests: Sequence[Digest]) -> None:
        """Complete the checkpoint and remove older ones; runs on rank 0."""
        assert self._metadata is not None
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        files[META] = write_json(self._tmp / META, self._metadata.to_json())
        write_manifest(self._tmp, files)
        replaced = None
        with atomic_write(self._root / LATEST) as pointer:
            pointer.write(f"{self._final.name}\n".encode())
            pointer.flush()
            os.fsync(pointer.fileno())  # everything that needs space is on the disk before the first rename
            if self._final.exists():  # the same number of images again, after a resume from an older checkpoint
                replaced = rename_for_removal(self._final)
            self._tmp.rename(self._final)
        if replaced is not None:
            remove_tree(replaced, ignore_errors=True)
        try:
            left = leave_newer(self._root, self.images)
            if left:
                print(f"{'left':>11}  {', '.join(left)}: from an abandoned branch of this run, or damaged", flush=True)
            remove_surplus(self._root, self._final.name, self._config)
        except OSError as error:  # this checkpoint is saved in any case
            print(f"*** WARNING: {self._root}: {error}; keeping older checkpoints ***", file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run an action and keep its error for the next vote."""
        try:
            action()
            return
        except CheckpointError as error:
            reason = str(error)
        except OSError as error:
            reason = str(write_error(self._tmp, error))
        except Exception as error:  # an error that leaves a thread is printed and lost
            reason = f"{self._tmp}: {type(error).__name__}: {error}."
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


def _words(sha256: str) -> list[int]:
    """Return a checksum as four signed 64-bit numbers, which a collective can carry."""
    data = bytes.fromhex(sha256)
    return [int.from_bytes(data[start : start + 8], "big", signed=True) for start in range(0, 32, 8)]


def _hex(words: Sequence[int]) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words).hex()
