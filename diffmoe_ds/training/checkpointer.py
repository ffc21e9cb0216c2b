"""Checkpointing during training: save, wait, report, requeue."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NoReturn

from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, SavedLayout, ScheduledValues
from diffmoe_ds.checkpoint.save import CheckpointSaver
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import AlreadyReportedError, CheckpointError, DiffMoEError, Requeue
from diffmoe_ds.model.dit import saved_buffers
from diffmoe_ds.training.setup import Run


class Checkpointer:
    """Saves the checkpoints of a run.  Every rank must call the same methods at the same step."""

    def __init__(self, run: Run, watchdog: Watchdog, lock: RunLock | None) -> None:
        """Get ready to save.

        Args:
            run: the run to save.
            watchdog: told that the rank is alive while the files of a checkpoint are written or removed.
            lock: the run lock, on the rank that holds it; nothing is written once another job has taken it.
        """
        self._run = run
        self._watchdog = watchdog
        self._lock = lock
        self._saver = CheckpointSaver(
            run.directory, run.config.checkpoint, run.device, run.owner, watchdog.alive
        )  # fmt: skip
        self._saved_images = self._started_images = run.images
        self._started_s = time.monotonic()
        self._pause_s = 0.0
        self.last: Path | None = None
        """The last complete checkpoint of this run."""

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._saver.is_writing

    @property
    def is_due(self) -> bool:
        """Whether ``run.save_every_minutes`` have passed since the last save; always False on ranks other than 0."""
        minutes = self._run.config.run.save_every_minutes
        passed = time.monotonic() - self._started_s
        return self._run.is_main and minutes > 0 and passed >= 60 * minutes and not self.is_writing

    def start(self, wait: bool = False) -> None:
        """Start saving the current state; training continues meanwhile unless ``checkpoint.async_save`` is off.

        Args:
            wait: block until the checkpoint is on disk, and raise on failure regardless of ``checkpoint.on_error``.
        """
        self.complete()
        self._check_lock()
        run, start = self._run, time.perf_counter()
        self._started_images, self._started_s = run.images, time.monotonic()
        self._saver.start(run.ema.fragments, run.ema.values, saved_buffers(run.model), _metadata(run))
        self._pause_s = time.perf_counter() - start
        if wait or not run.config.checkpoint.async_save:
            self._finish(must_succeed=wait)

    def start_if_new(self) -> None:
        """Start saving, unless a save of this step has been started."""
        if self._run.images > self._started_images:
            self.start()

    def complete(self) -> None:
        """Finish the checkpoint in progress, if any; blocks until it is on disk."""
        if self._saver.is_open:
            self._finish()

    def complete_earlier(self) -> None:
        """Finish the checkpoint in progress, unless it was started at the end of the step before.

        That one may still be written on some rank: the ranks agreed in the middle of the step, before it was started.
        """
        if self._saver.is_open and self._saver.images < self._run.images:
            self.complete()

    def save_rest(self) -> None:
        """Finish the checkpoint in progress, then save any unsaved progress."""
        self.complete()
        if self._run.images > self._saved_images:
            self.start(wait=True)
        self._saver.wait_for_retention()  # the run ends next

    def save_before_exit(self) -> None:
        """Finish the checkpoint in progress and save any unsaved progress, before the run ends with another error."""
        try:
            self.save_rest()
        except DiffMoEError as error:
            if not isinstance(error, AlreadyReportedError):
                print(f"\n*** WARNING: progress was not saved: {error} ***\n", file=sys.stderr, flush=True)

    def save_and_requeue(self, signal: str) -> NoReturn:
        """Save unsaved progress and exit with the requeue code.

        Args:
            signal: the name of the signal that this rank received; empty if another rank did.

        Raises:
            Requeue: always.
        """
        self.save_rest()
        where = f"saved {self.last}" if self.last else "nothing left to save"
        raise Requeue(
            f"asked to stop ({signal or 'signal on another rank'}); {self._run.images:,} images seen, {where}; "
            f"{self._run.again} continues."
        )

    def _finish(self, must_succeed: bool = False) -> None:
        start, images = time.perf_counter(), self._saver.images
        try:
            self.last = self._saver.finish(self._watchdog.tick)
            self._saved_images = images
        except (CheckpointError, AlreadyReportedError) as error:
            self._check_lock()  # the reason, if another job has taken over
            if must_succeed or self._run.config.checkpoint.on_error == "stop":
                raise
            if isinstance(error, CheckpointError):  # AlreadyReportedError: another rank prints it
                print(f"\n*** WARNING: {error} Training continues without it. ***\n", file=sys.stderr, flush=True)
            return
        self._pause_s += time.perf_counter() - start
        self._check_lock()  # a job that has taken over may have removed this checkpoint by now
        if self._run.is_main:
            print(f"{'saved':>11}  {self.last} (training waited {self._pause_s:.3f} s)", flush=True)

    def _check_lock(self) -> None:
        """Raise RunDirectoryBusyError on all ranks if another job has taken over the run directory."""
        raise_on_all_ranks(self._run.device, lambda: None if self._lock is None else self._lock.check_now())


def _metadata(run: Run) -> CheckpointMetadata:
    scheduler, now, settings = run.engine.lr_scheduler, seam.scheduled(run.engine), run.settings
    return CheckpointMetadata(
        files=run.topology.world,
        images=run.images,
        step=run.step,
        adam_step=seam.adam_step(run.engine),
        shapes={name: tuple(part.logical_shape) for name, part in run.ema.parts.items()},
        config=run.config,
        lr_now=ScheduledValues(now["lr"], tuple(now["betas"])),
        layout=SavedLayout(
            world=run.topology.world,
            ep_size=run.topology.ep_size,
            zero_stage=settings.zero_stage,
            global_batch=settings.global_batch,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation,
        ),
        lr_scheduler=None if scheduler is None else scheduler.state_dict(),
        began_from=run.began_from,
        deepspeed=settings.beside_layout(),
        class_names=run.class_names,
        text=run.text,
        repa_network=run.repa_network,
    )
