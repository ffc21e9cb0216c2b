"""Micro-batches for the training loop, read by position and fetched in lockstep on all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial

from diffmoe_ds.data.dataset import image_shape
from diffmoe_ds.data.loader import LoaderSettings, MicroBatch, PositionLoader
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.distributed.consensus import vote
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.errors import DataError, DiffMoEError
from diffmoe_ds.rng import training_draws
from diffmoe_ds.training.setup import Run


class BatchSource:
    """This rank's micro-batches from the run's current position, and the time spent waiting for them."""

    def __init__(self, run: Run, dataset: Dataset, lock: RunLock | None = None) -> None:
        """Start the data loader.

        Args:
            run: from `setup_run`.
            dataset: the images.
            lock: the run lock, on the rank that holds it; if another job takes the lock, the next fetch raises.
        """
        self._batches: Iterator[MicroBatch] = iter(make_loader(run, dataset))
        self._device = run.device
        self._lock = lock
        self._waited_s = 0.0

    def fetch(self, stop: bool = False, writing: bool = False) -> tuple[MicroBatch, bool, bool]:
        """Return the next micro-batch, after all ranks agreed on errors and flags.

        Args:
            stop: whether this rank was asked to stop.
            writing: whether this rank is still writing a checkpoint.

        Returns:
            The micro-batch on the run's device, and whether any rank has ``stop`` or ``writing`` set.

        Raises:
            DataError: on all ranks, if any cannot read its images.
            RunDirectoryBusyError: on all ranks, if another job has taken over the run directory.
        """
        failure: DiffMoEError | None = None
        start = time.perf_counter()
        try:
            if self._lock is not None:
                self._lock.check()
            batch = next(self._batches)
        except DiffMoEError as error:
            failure = error
        except Exception as error:  # e.g. a killed worker, out of memory, an unmounted file system
            failure = DataError(f"cannot read images: {type(error).__name__}: {' '.join(str(error).split())}")
        self._waited_s += time.perf_counter() - start
        stop, writing = vote(self._device, failure, stop, writing)
        return batch.to(self._device), stop, writing

    def close(self) -> None:
        """End the loader's workers."""
        self._batches = iter(())

    def waited_s(self) -> float:
        """Return the seconds spent waiting for images since the last call."""
        seconds, self._waited_s = self._waited_s, 0.0
        return round(seconds, 6)


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
        num_workers=data.num_workers,
        shuffle_window=data.shuffle_window if data.shuffle == "window" else 0,
    )
    loader = PositionLoader(dataset, reading, draws)
    if data.vae is None:
        return loader
    from diffmoe_ds.data.vae import VAE, EncodingLoader  # imports diffusers, an extra

    return EncodingLoader(loader, VAE(data.vae, run.device))
