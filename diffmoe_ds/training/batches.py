"""Micro-batches for the training loop, read by position and fetched in lockstep on all ranks."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffmoe_ds.data.dataset import image_shape
from diffmoe_ds.data.loader import LoaderSettings, MicroBatch, PositionLoader
from diffmoe_ds.data.reader import Dataset, Unreadable
from diffmoe_ds.distributed.collectives import all_gather, all_reduce, get_rank
from diffmoe_ds.distributed.consensus import agree, raise_agreed, vote
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DataError, DiffMoEError
from diffmoe_ds.rng import training_draws
from diffmoe_ds.text import counted
from diffmoe_ds.training.setup import Run

if TYPE_CHECKING:
    from diffmoe_ds.data.vae import VAE


class BatchSource:
    """This rank's micro-batches from the run's current position, one ahead, and the time spent waiting for them."""

    def __init__(self, run: Run, dataset: Dataset, watchdog: Watchdog, lock: RunLock | None = None) -> None:
        """Start the data loader.

        Args:
            run: from `setup_run`.
            dataset: the images.
            watchdog: ticked after each micro-batch that is read.
            lock: the run lock, on the rank that holds it; if another job takes the lock, the next `take` raises.
        """
        self._batches: Iterator[MicroBatch] = iter(make_loader(run, dataset))
        missing = max(0, run.config.run.total_images - run.images)
        self._left = math.ceil(missing / run.settings.global_batch) * run.settings.accumulation
        self._device = run.device
        self._watchdog = watchdog
        self._lock = lock
        self._waited_s = 0.0
        self._next: MicroBatch | None = None
        self._failure: DiffMoEError | None = None
        self._winner = 0
        self._unreadable = UnreadableImages(run.config.data.max_unreadable, len(dataset), run.device)
        self._has_new = self._any_has_new = False
        self.flags: tuple[bool, ...] = ()
        """For each flag of the last `agree`, whether any rank set it."""
        self.attachments_WX: Tensor | None = None
        """int32: the attachment of every rank to the last `agree`."""

    def agree(self, flags: tuple[bool, ...], values_N: Tensor, attachment_X: Tensor | None = None) -> list[float]:
        """Read the next micro-batch and agree on errors, flags and values, in one message. Every rank must call this.

        Nothing is read for a run that is complete, and during its last micro-step.

        In a step this happens between the forward and the backward pass: a GPU is busy while the host reads, and it is
        the only time that the host waits for the GPU. An error is not raised before the next `take`, so the step that
        is running is not lost.

        Args:
            flags: this rank's answers to yes-or-no questions.
            values_N: fp32, on the run's device.
            attachment_X: int32 numbers to send to every rank, if any.

        Returns:
            The mean of each value over the ranks.
        """
        self._read()
        answers = (self._has_new, *flags)
        self._winner, answers, means, self.attachments_WX = agree(values_N, self._failure, answers, attachment_X)
        self._any_has_new, *others = answers
        self.flags = tuple(others)
        return means

    def agree_again(self, values_N: Tensor, attachment_X: Tensor | None) -> list[float]:
        """Agree on the values of a forward pass that was repeated; errors and flags stay those of the last `agree`.

        Args:
            values_N: see `agree`.
            attachment_X: see `agree`.

        Returns:
            The mean of each value over the ranks.
        """
        *_, means, self.attachments_WX = agree(values_N, None, (), attachment_X)
        return means

    def take(self) -> MicroBatch:
        """Return the micro-batch that the last `agree` read, on the run's device.

        Raises:
            DataError: on all ranks, if any could not read its images, or too many images are unreadable.
            WorkerLostError: on all ranks, if a loader worker of any has died.
            RunDirectoryBusyError: on all ranks, if another job has taken over the run directory.
        """
        raise_agreed(self._winner, self._failure, get_rank())
        if self._any_has_new:
            self._unreadable.exchange()
            self._has_new = self._any_has_new = False
        assert self._next is not None, "without an error there is a micro-batch"
        batch, self._next = self._next, None
        return batch.to(self._device)

    def _read(self) -> None:
        if self._left == 0:
            return  # the run ends after this step, or is complete
        self._left -= 1
        start = time.perf_counter()
        try:
            if self._lock is not None:
                self._lock.check()
            self._next = next(self._batches)
            self._has_new = self._unreadable.add(self._next.unreadable)
        except DiffMoEError as error:
            self._failure = error
        except Exception as error:  # e.g. out of memory, an unmounted file system
            self._failure = as_data_error(error)
        self._waited_s += time.perf_counter() - start
        self._watchdog.tick()  # so that a rank that cannot read is behind those that wait for it

    def close(self) -> None:
        """End the loader's workers."""
        self._batches = iter(())

    def waited_s(self) -> float:
        """Return the seconds spent waiting for images since the last call."""
        seconds, self._waited_s = self._waited_s, 0.0
        return round(seconds, 6)


class UnreadableImages:
    """Counts and names the images that cannot be read; each counts once, however often and on which ranks it occurs."""

    def __init__(self, fraction: float, num_images: int, device: torch.device) -> None:
        """Allow a fraction of the images (``data.max_unreadable``); the device is that of the collectives."""
        self._fraction = fraction
        self._num_images = num_images
        self._device = device
        self._known: set[int] = set()
        self._new: dict[int, str] = {}

    def add(self, found: Iterable[Unreadable]) -> bool:
        """Note what this rank has found, and return whether any of it is new."""
        self._new = {image: problem for image, problem in found if image not in self._known}
        return bool(self._new)

    def exchange(self) -> None:
        """Count and print what all ranks have noted. Every rank must call this if any has found something new.

        Raises:
            DataError: on all ranks, if there are too many.
        """
        mine_N = torch.tensor(sorted(self._new), dtype=torch.int64, device=self._device)
        most = int(all_reduce(torch.tensor(len(mine_N), device=self._device), "max"))
        every_WN = torch.stack(all_gather(pad(mine_N, (0, most - len(mine_N)), value=-1))).tolist()
        failure = None
        for rank, images in enumerate(every_WN):
            for image in images:
                if image < 0 or image in self._known:
                    continue
                self._known.add(image)
                if rank == get_rank():
                    failure = failure or self._report(self._new[image])
        vote(self._device, failure)

    def _report(self, problem: str) -> DataError | None:
        """Print the problem of the image that was counted last, or return an error if it is one too many."""
        count, allowed = len(self._known), int(self._fraction * self._num_images)
        if count > allowed:
            return DataError(
                f"{problem}; {counted(count, 'unreadable image')} of {self._num_images:,}, but data.max_unreadable "
                f"{self._fraction:g} allows {allowed:,}"
            )
        where = f"rank {get_rank()}, {count} of {allowed:,} allowed"
        print(f"*** WARNING: {problem}; the next image replaces it ({where}) ***", file=sys.stderr, flush=True)
        return None


def as_data_error(error: Exception) -> DataError:
    """Wrap any other error that occurred while reading images; torch's error of a worker is its traceback."""
    text = str(error).strip()
    places = re.findall(r'File "(.+)", line ([0-9]+)', text)
    if "Original Traceback" in text and places:
        file, line = places[-1]
        return DataError(f"cannot read images: {text.splitlines()[-1]} (in a loader worker, at {file}:{line})")
    return DataError(f"cannot read images: {type(error).__name__}: {' '.join(text.split())}")


def make_loader(run: Run, dataset: Dataset) -> Iterable[MicroBatch]:
    """Return the loader of this rank's micro-batches, from the run's current position."""
    data, model, settings = run.config.data, run.config.model, run.settings
    draws = partial(
        training_draws,
        run.config.run.seed,
        shape=(model.in_channels, model.input_size, model.input_size),
        label_dropout=model.label_dropout,
        flip=data.horizontal_flip,
        posterior=dataset.latents is not None or data.vae is not None,
    )
    reading = LoaderSettings(
        seed=run.config.run.seed,
        global_batch=settings.global_batch,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        rank=run.topology.rank,
        world=run.topology.world,
        start_position=run.images,
        image_shape=image_shape(run.config),
        num_classes=model.num_classes,
        reads_text=run.config.is_text,
        reads_features=run.config.aligned_block is not None,
        num_workers=data.num_workers,
        replaces_unreadable=data.max_unreadable > 0,
        shuffle_window=data.shuffle_window if data.shuffle == "window" else 0,
        shuffle="whole" if data.shuffle == "whole" else "feistel",
    )
    loader = PositionLoader(dataset, reading, draws)
    if data.vae is None:
        return loader
    from diffmoe_ds.data.vae import EncodingLoader  # imports diffusers, an extra

    return EncodingLoader(loader, load_vae(data.vae, run.device))


@cache
def load_vae(path: str, device: torch.device) -> VAE:
    """Load a VAE once per process, shared by training and evaluation.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from diffmoe_ds.data.vae import VAE  # imports diffusers, an extra

    return VAE(path, device)
