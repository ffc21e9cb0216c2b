"""Position-exact loader: which images a rank reads depends on the progress of the run only.

Step s of the run starts at position P0 = start + s * global_batch.  In micro-step m of that step, rank r of W reads
the positions P0 + (m * W + r) * B + [0, B) for micro-batches of B images.  The number of ranks, the accumulation and
the workers may change at every resume; the images, their shuffle and their random draws stay the same.

Legend: B images, C channels, H and W height and width.
"""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import math
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from diffmoe_ds.data.reader import (
    Dataset,
    Packed,
    Reader,
    Task,
    Unreadable,
    check_labels,
    check_latents,
    features_shape,
    text_shape,
)
from diffmoe_ds.data.shuffle import FeistelShuffle, Shuffle, WholeShuffle, WindowShuffle
from diffmoe_ds.errors import DataError, WorkerLostError
from diffmoe_ds.rng import TrainingDraws, caption_choice

PREFETCHED_PER_WORKER = 2  # micro-batches that each worker may read ahead
SLOTS_PER_WORKER = PREFETCHED_PER_WORKER + 1  # those read ahead, and the one being copied out
HINTS: dict[int, str] = {
    signal.SIGKILL: ", probably because memory ran out; lower data.num_workers or give the job more memory",
    signal.SIGBUS: ", probably because shared memory ran out; lower data.num_workers or enlarge /dev/shm",
}
"""What to try when a signal has killed a worker."""


class MicroBatch(NamedTuple):
    """B images with all their random draws, as CPU tensors."""

    x: torch.Tensor  # float32 [B, C, H, W]: images in [-1, 1], latents as stored
    label: torch.Tensor  # int64 [B]; 0 for text models
    noise: torch.Tensor  # float32 [B, C, H, W]
    time: torch.Tensor  # float32 [B] in [0, 1)
    drop: torch.Tensor  # bool [B]: the label is dropped, for classifier-free guidance
    position: torch.Tensor  # int64 [B]
    posterior: torch.Tensor | None = None  # float32 [B, C, H, W]: noise for the VAE posterior, if x is not encoded yet
    unreadable: tuple[Unreadable, ...] = ()  # images that were replaced by those of later positions
    features: torch.Tensor | None = None  # fp16 [B, T, F]: image features, of the mirror image if x is one; for REPA
    text: torch.Tensor | None = None  # fp16 [B, N]: text features, see `TextLayout`; None for class models

    @property
    def condition(self) -> torch.Tensor:
        """What the images are generated from: labels or text features."""
        return self.label if self.text is None else self.text

    def to(self, device: torch.device) -> MicroBatch:
        """Return the batch on a device; the copies may still be running."""
        fields: dict[str, Any] = {
            name: field for name, field in self._asdict().items() if isinstance(field, torch.Tensor)
        }
        return self._replace(**{name: field.to(device, non_blocking=True) for name, field in fields.items()})


@dataclass(frozen=True)
class LoaderSettings:
    """Which micro-batches a rank reads, and how."""

    seed: int
    """Seed of the shuffle."""
    global_batch: int
    """Images per optimizer step over all ranks: micro_batch * accumulation * world."""
    micro_batch: int
    """Images per micro-step and rank."""
    accumulation: int
    """Micro-steps per optimizer step."""
    rank: int
    """This rank."""
    world: int
    """Number of ranks."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of `x`.  Smaller images are padded centrally with black; latents must fit exactly."""
    num_classes: int
    """Classes of the model.  A dataset without labels trains as one class: every label is 0."""
    reads_text: bool = False
    """Whether the model takes text features in place of labels, which then may have any value."""
    reads_features: bool = False
    """Whether the model is trained to align its tokens with image features."""
    start_position: int = 0
    """Images that the run has trained on already."""
    num_workers: int = 0
    """Loader processes of this rank; 0 reads in the training process."""
    replaces_unreadable: bool = False
    """Whether the image of the next position replaces one that cannot be read."""
    shuffle_window: int = 0
    """Images per window of a `WindowShuffle`; 0 shuffles across the whole dataset."""
    shuffle: Literal["feistel", "whole"] = "whole"
    """Selects `FeistelShuffle` or `WholeShuffle`, if `shuffle_window` is 0."""

    def __post_init__(self) -> None:
        assert self.global_batch == self.micro_batch * self.accumulation * self.world, self
        assert 0 <= self.rank < self.world and self.start_position >= 0, self


class PositionLoader:
    """An endless iterable of one rank's micro-batches; each `iter()` starts at `start_position` again.

    The workers live as long as the iterator, which is as long as the run.  Each holds at most `PREFETCHED_PER_WORKER`
    micro-batches; only the index and the epoch of a `WholeShuffle` grow with the dataset.  Drop an unfinished iterator
    while the process still runs: the garbage collector finalizes the workers' queues first, and the workers then have
    to time out.
    """

    def __init__(self, dataset: Dataset, settings: LoaderSettings, draws: Callable[[int], TrainingDraws]) -> None:
        """Check that the dataset fits the model.

        Args:
            dataset: the images.
            settings: which of them to read.
            draws: returns the random draws of a position.

        Raises:
            DataError: the labels do not fit `num_classes`, or the latents `image_shape`.  Iterating raises it for a
                sample that cannot be read or does not fit, and `WorkerLostError` if a worker has died.
        """
        if not settings.reads_text:
            check_labels(dataset, settings.num_classes)
        check_latents(dataset.latents, settings.image_shape)
        shuffle: Shuffle
        if settings.shuffle_window:
            shuffle = WindowShuffle(settings.seed, dataset.shard_sizes, settings.shuffle_window)
        elif settings.shuffle == "feistel":
            shuffle = FeistelShuffle(settings.seed, len(dataset))
        else:
            shuffle = WholeShuffle(settings.seed, len(dataset))
        micro_batch, stride = settings.micro_batch, settings.world * settings.micro_batch
        self._dataset = dataset
        self._shuffle = shuffle
        self._rank = settings.rank
        self._draws = draws
        self._num_workers = settings.num_workers
        self._replaces = settings.replaces_unreadable
        self._choose = functools.partial(caption_choice, settings.seed) if settings.reads_text else None
        first_position = settings.start_position + settings.rank * micro_batch
        self._positions = _Positions(first_position, micro_batch, stride)
        first = draws(settings.start_position)
        shapes: dict[str, tuple[int, ...]] = {"x": settings.image_shape, "noise": first.noise.shape}
        if first.posterior is not None and dataset.latents is None:
            shapes["posterior"] = first.posterior.shape
        if settings.reads_features:
            shapes["features"] = features_shape(dataset)
        if settings.reads_text:
            shapes["text"] = text_shape(dataset)
        self._shapes = {name: (micro_batch, *shape) for name, shape in shapes.items()}

    def __iter__(self) -> Iterator[MicroBatch]:
        workers, slots, closing = self._num_workers, None, torch.zeros((), dtype=torch.uint8)
        if workers:
            closing.share_memory_()
            atexit.register(_close, closing)  # runs before multiprocessing's handler, which was registered earlier
            values = sum(map(math.prod, self._shapes.values()))
            slots = torch.empty(workers, SLOTS_PER_WORKER, values).share_memory_()
        reader = Reader(self._dataset, self._shuffle, self._draws, self._shapes, slots, self._replaces, self._choose)
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            reader,  # type: ignore[arg-type]  # maps tasks, not indices, to items
            sampler=self._positions,
            batch_size=None,  # each item of the sampler is a micro-batch
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # the index is inherited; see also `_start_worker`
            prefetch_factor=PREFETCHED_PER_WORKER if workers else None,
            collate_fn=_identity,
            worker_init_fn=functools.partial(_start_worker, os.getpid(), closing),
            generator=torch.Generator(),  # otherwise each new iterator draws from the global generator
        )
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        started = [child for child in multiprocessing.active_children() if child not in others]
        if workers and _in_main_thread():
            # torch's handler raises wherever the main thread is when a worker dies, even in the middle of a save.
            # If this process has inherited that the signal is ignored, it could not learn of the death at all.
            signal.signal(signal.SIGCHLD, handler if callable(handler) else signal.SIG_DFL)
        try:
            for number in itertools.count():
                with _reporting_deaths(started, self._rank):
                    item = next(items)
                if isinstance(item, DataError):
                    raise item
                yield to_micro_batch(reader, number, item)
        finally:
            _close(closing)
            del items  # ends the workers even if a traceback refers to this frame


def to_micro_batch(reader: Reader, number: int, item: Packed) -> MicroBatch:
    """Return micro-batch ``number`` from what a reader returned and, if it has slots, from its slot."""
    large = item.large
    if large is None:
        slot = reader.slot(number)
        large = torch.empty(slot.shape, pin_memory=torch.cuda.is_available())
        np.copyto(large.numpy(), slot.numpy())  # torch's copy would wake its thread pool
    small = {name: torch.from_numpy(getattr(item, name)) for name in ("label", "time", "drop", "position")}
    return MicroBatch(**reader.split(large), **small, unreadable=item.unreadable)


@dataclass(frozen=True)
class _Positions:
    """Endless positions of one rank's micro-batches.

    Micro-steps and steps are contiguous, so a single stride covers both.
    """

    first: int
    micro_batch: int
    stride: int

    def __iter__(self) -> Iterator[Task]:
        for number, first in enumerate(itertools.count(self.first, self.stride)):
            yield Task(number, range(first, first + self.micro_batch))


@contextmanager
def _reporting_deaths(workers: Sequence[BaseProcess], rank: int) -> Iterator[None]:
    """Within the context, report the death of a worker as soon as it happens, also if it was before.

    Otherwise the main thread could wait forever for the rest of a message that the worker began to send.

    Args:
        workers: the worker processes.
        rank: this rank, for the message.

    Raises:
        WorkerLostError: a worker is dead.
    """
    listens = bool(workers) and _in_main_thread()
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL

    def check(*_: object) -> None:
        for worker in workers:
            if worker.exitcode is not None:
                if listens:
                    signal.signal(signal.SIGCHLD, before)  # here, because the error may be raised in the finally below
                raise _lost(worker, rank)

    try:
        if listens:
            signal.signal(signal.SIGCHLD, check)
        check()
        yield
    except Exception:
        check()  # torch wraps what a handler raises
        raise
    finally:
        if listens:
            signal.signal(signal.SIGCHLD, before)


def _lost(worker: BaseProcess, rank: int) -> WorkerLostError:
    """Return the error for a worker that has died."""
    code = worker.exitcode or 0
    names = {-number: number.name for number in signal.Signals}
    how = f"exited with code {code}" if code >= 0 else f"was killed by {names.get(code, f'signal {-code}')}"
    where = f"rank {rank} (process {worker.pid} on {socket.gethostname()})"
    return WorkerLostError(f"a loader worker of {where} {how}{HINTS.get(-code, '')}.")


def _in_main_thread() -> bool:
    """Return whether this thread may handle signals."""
    return threading.current_thread() is threading.main_thread()


def _identity(item: Any) -> Any:
    return item


def _close(closing: torch.Tensor) -> None:
    closing.fill_(1)


def _start_worker(parent: int, closing: torch.Tensor, worker: int) -> None:
    """Let a worker live exactly as long as the training process needs it.

    It exits if that process is already gone: torch notices only if it dies from now on. It ignores the signals that
    request a graceful stop (Ctrl-C, Slurm's warning, SIGTERM to a whole job), because the training process stops at
    the end of a step and needs its workers until then. When it exits, it sets `closing`, and Python terminates the
    workers with SIGTERM.
    """
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # the collector writes to the objects that it visits, which would copy those of the training process
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.item() else None)
