"""The training loop: fetch, step, hooks.  `training/step.py` implements the step."""

from __future__ import annotations

from pathlib import Path

import torch

from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.distributed.stragglers import Stragglers
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DataError, DiffMoEError, NonFiniteError, WorkerLostError
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.checkpointer import Checkpointer
from diffmoe_ds.training.hooks import make_hooks
from diffmoe_ds.training.run_log import RunLog
from diffmoe_ds.training.setup import Run
from diffmoe_ds.training.step import SkippedSteps, train_step


def train(
    run: Run, batches: BatchSource, log: RunLog, watchdog: Watchdog, lock: RunLock | None, hosts: tuple[str, ...]
) -> Path | None:
    """Train until the run has seen ``run.total_images`` images.  Every rank must call this.

    Returns:
        The last checkpoint written, or None if nothing was left to do.

    Raises:
        Requeue: a signal asked the run to stop; all progress is saved.
        DiffMoEError: on all ranks, if a step is non-finite, or any rank cannot read its images or save.
    """
    checkpointer = Checkpointer(run, watchdog, lock)
    stragglers = Stragglers(run.config.run.straggler_steps, run.config.run.straggler_ratio, hosts, run.device)
    skipped = SkippedSteps(run, log)
    hooks = make_hooks(run, log, batches, checkpointer, stragglers, watchdog)

    def flags() -> tuple[bool, bool, bool]:
        return signals.received() != "", checkpointer.is_writing, checkpointer.is_due

    batches.agree(flags(), torch.zeros(0, device=run.device))  # reads the first micro-batch
    while not run.is_complete:
        watchdog.tick(run.step)
        _save_as_agreed(batches.flags, checkpointer, log)
        try:
            result = train_step(run, batches, flags, watchdog, stragglers)
        except NonFiniteError as error:
            skipped.count(error, checkpointer)
            continue
        except DiffMoEError as error:
            if error.exit_code in (DataError.exit_code, WorkerLostError.exit_code):  # on all ranks, before the step
                log.settle()
                checkpointer.save_before_exit()
            raise
        skipped.reset()
        run.advance()
        for hook in hooks:
            hook(result)
    checkpointer.save_rest()
    return checkpointer.last


def _save_as_agreed(flags: tuple[bool, ...], checkpointer: Checkpointer, log: RunLog) -> None:
    """Between two steps, finish, start or enforce a checkpoint, as the ranks have agreed.

    Args:
        flags: whether any rank was asked to stop, is still writing a checkpoint, and finds that one is due.
        checkpointer: writes it.
        log: the run log, which must be complete before.

    Raises:
        Requeue: the run was asked to stop.
    """
    stop, writing, due = flags
    if not writing:
        checkpointer.complete_earlier()
    if stop or due:
        log.settle()
    if stop:
        checkpointer.save_and_requeue(signals.received())
    if due:
        checkpointer.start_if_new()
