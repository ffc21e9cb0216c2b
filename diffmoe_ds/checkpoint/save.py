"""Save checkpoints atomically while training continues.

At a step boundary every rank copies its state into host memory (`CheckpointSaver.start`), and a thread writes the copy
into the owner's directory.  At a later boundary, when all ranks know that all threads are done, rank 0 adds metadata
and manifest, renames the directory and switches ``latest`` (`CheckpointSaver.finish`); another thread removes old
checkpoints.  The threads call no collective: collectives belong to the training loop.
"""

from __future__ import annotations

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
    checkpoint_order,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, write_manifest
from diffmoe_ds.checkpoint.retention import leave_abandoned, new_name, remove_surplus
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.distributed.collectives import all_gather, broadcast, get_rank, get_world_size
from diffmoe_ds.distributed.consensus import vote
from diffmoe_ds.distributed.fragments import Fragment
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.errors import CheckpointError, DiffMoEError
from diffmoe_ds.files import Digest, remove_tree, sync_directory, write_error, write_json, write_synced


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time.

    Every rank has one, and all ranks must construct it, `start` and `finish` together.
    """

    def __init__(
        self,
        run_directory: Path,
        config: CheckpointConfig,
        device: torch.device,
        owner: Owner,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare for saving.

        Args:
            run_directory: on a file system that all ranks share.
            config: how many checkpoints are kept.
            device: where the process group's tensors live.
            owner: of the run directory; has claimed the directory of its checkpoints.
            alive: called whenever the disk has done something for which this rank waits; see `Watchdog.alive`.
        """
        self._root = checkpoint_root(run_directory)
        self._config = config
        self._device = device
        self._owner = owner
        self._alive = alive
        self._host: dict[str, Tensor] = {}  # the copies, allocated by the first save and reused
        self._thread: threading.Thread | None = None
        self._retention: threading.Thread | None = None
        self._tmp = self._root
        self._metadata: CheckpointMetadata | None = None
        self._digest = Digest(0, "")
        self._failure: CheckpointError | None = None
        self._progress = 0
        """Increases while a thread writes or removes something."""

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
        self.wait_for_retention()  # this checkpoint may need the space
        self._metadata = replace(metadata, files=get_world_size())
        self._tmp = self._owner.directory(self._root) / checkpoint_name(metadata.images)
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

    def finish(self, tick: Callable[[], object] = lambda: None) -> Path:
        """Wait for this rank's thread and complete the checkpoint.

        Args:
            tick: called before this rank waits for the others, see `Watchdog.tick`.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: on all ranks, if one could not write; nothing of the checkpoint is left, and earlier ones
                are unchanged.
        """
        assert self._thread is not None, "start() a checkpoint first"
        self._join(self._thread)
        self._thread = None
        tick()
        self._agree()
        mine = torch.tensor([self._digest.size, *_words(self._digest.sha256)], dtype=torch.int64, device=self._device)
        digests = [Digest(size, _hex(words)) for size, *words in (row.tolist() for row in all_gather(mine))]
        number = torch.ones((), dtype=torch.int64, device=self._device)
        if get_rank() == 0:
            self._attempt(lambda: number.fill_(self._complete(digests)))
        tick()
        self._agree()
        return self._root / checkpoint_name(self.images, int(broadcast(number)))

    def wait_for_retention(self) -> None:
        """Wait until this rank has removed the checkpoints that the last save made superfluous."""
        if self._retention is not None:
            self._join(self._retention)

    def _join(self, thread: threading.Thread) -> None:
        """Wait for a thread; only its progress is a sign of life, because it may hang."""
        progress = self._progress
        while thread.is_alive():
            thread.join(0.01)
            if self._progress != progress:
                progress = self._progress
                self._alive()

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
            path.parent.mkdir(exist_ok=True)  # not its parents: see `Owner.claim`
            self._digest = write_safetensors(path, entries, {}, self._advance)
        except OSError as error:
            raise write_error(path, error) from None

    def _advance(self) -> None:
        self._progress += 1

    def _complete(self, digests: Sequence[Digest]) -> int:
        """Complete the checkpoint, and start to remove older ones; runs on rank 0.

        Returns:
            The second argument of `checkpoint_name`.
        """
        assert self._metadata is not None
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        files[META] = write_json(self._tmp / META, self._metadata.to_json())
        self._alive()
        write_manifest(self._tmp, files)
        self._alive()
        name = new_name(self._root, self.images)
        pointer = self._owner.directory(self._root) / LATEST
        pointer.unlink(missing_ok=True)  # of a save that failed
        write_synced(pointer, f"{name}\n".encode())  # all that needs space is on the disk before the first rename
        self._alive()
        self._tmp.rename(self._root / name)
        self._alive()
        # this checkpoint is saved in any case, and `candidates` prefers it if one of these two steps succeeds
        try:
            left = leave_abandoned(self._root, name, self._owner)
            if left:
                print(f"{'left':>11}  {', '.join(left)}: from an abandoned branch of this run, or damaged", flush=True)
        except OSError as error:
            effect = "the checkpoint is saved, but some of an abandoned branch keep their names"
            self._warn(error.filename or self._root, "renamed", error, effect)
        self._alive()
        try:
            pointer.rename(self._root / LATEST)
            sync_directory(self._root)
        except OSError as error:
            self._warn(
                self._root / LATEST, "written", error, f"the checkpoint is saved, but {LATEST} may name an older one"
            )
        self._retention = threading.Thread(target=self._retain, args=(name,), name="retention", daemon=True)
        self._retention.start()
        order = checkpoint_order(name)
        assert order is not None
        return order[1]

    def _retain(self, newest: str) -> None:
        """Remove older checkpoints; runs in a thread of rank 0."""
        try:
            remove_surplus(self._root, newest, self._config, self._owner, self._advance)
        except OSError as error:
            self._warn(error.filename or self._root, "removed", error, "older checkpoints are kept")

    def _warn(self, path: str | Path, failed: str, error: OSError, effect: str) -> None:
        text = f"{path}: cannot be {failed}: {error.strerror or error}; {effect}"
        print(f"*** WARNING: {text} ***", file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], object]) -> None:
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
        self._failure = CheckpointError(f"the checkpoint {self._tmp.name} was not saved: {where}: {reason}")

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
