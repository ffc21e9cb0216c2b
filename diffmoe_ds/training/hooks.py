"""Hooks that run after each optimizer step.

Hooks call collectives, so every rank runs the same hooks in the same order; output goes to a `RunLog`, which is a no-op
on all ranks but rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from diffmoe_ds.distributed.stragglers import Stragglers
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DiffMoEError
from diffmoe_ds.files import replacing
from diffmoe_ds.outputs import make_directory
from diffmoe_ds.sampling.grid import save_png
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.checkpointer import Checkpointer
from diffmoe_ds.training.host_memory import gather_host_memory
from diffmoe_ds.training.idle_experts import IdleExperts
from diffmoe_ds.training.log_files import require_owned
from diffmoe_ds.training.preview import Preview
from diffmoe_ds.training.profiler import ProfileSteps
from diffmoe_ds.training.routing_report import routing_report
from diffmoe_ds.training.run_log import RunLog
from diffmoe_ds.training.setup import Run
from diffmoe_ds.training.step import StepResult
from diffmoe_ds.training.validation import Validation

Hook = Callable[[StepResult], None]
"""Called on every rank after every optimizer step."""


def make_hooks(
    run: Run, log: RunLog, batches: BatchSource, checkpointer: Checkpointer, stragglers: Stragglers, watchdog: Watchdog
) -> tuple[Hook, ...]:
    """Return the hooks of a run, in the order in which they are called."""
    hooks = (
        LogStep(run, log, batches),
        CompareRanks(run, log, stragglers),
        LogLine(run, log),
        Validate(run, log, checkpointer, watchdog),
        Save(run, log, checkpointer),
        SampleGrid(run, log, watchdog),
        ProfileSteps(run, log),
    )
    return tuple(_counted(hook, watchdog) for hook in hooks)


def _counted(hook: Hook, watchdog: Watchdog) -> Hook:
    """Count a hook as progress: a rank that hangs in it is then behind those that wait for it in the next one."""

    def call(step: StepResult) -> None:
        hook(step)
        watchdog.tick()

    return call


class Interval:
    """Callable that is true once for each multiple of ``period`` images; never true if ``period`` is 0."""

    def __init__(self, period: int, images: int) -> None:
        self._period = period
        self._images = images

    def __call__(self, images: int) -> bool:
        before, self._images = self._images, images
        return self._period > 0 and images // self._period > before // self._period


class LogStep:
    """Add the step's row to ``metrics.jsonl``."""

    def __init__(self, run: Run, log: RunLog, batches: BatchSource) -> None:
        self._run, self._log, self._batches = run, log, batches

    def __call__(self, step: StepResult) -> None:
        losses = step.losses
        row: dict[str, Any] = {
            "step": self._run.step,
            "images": self._run.images,
            "loss": losses.total,
            "diffusion_loss": losses.diffusion,
            "capacity_loss": losses.capacity,
            "grad_norm": step.grad_norm,
            "lr": step.lr,
        }
        for name in self._run.config.auxiliary_losses:
            row[f"{name}_loss"] = getattr(losses, name)
        if self._run.config.loss.repa_weight:
            row["repa_loss"] = losses.alignment
        if self._run.config.routing.padded_dispatch is not None:
            row["redone"] = step.redone
        row["data_s"] = self._batches.waited_s()
        self._log.step(row)


class CompareRanks:
    """Compare the ranks' own work every ``run.straggler_steps`` steps and log the slowest rank."""

    def __init__(self, run: Run, log: RunLog, stragglers: Stragglers) -> None:
        self._run, self._log, self._stragglers = run, log, stragglers

    def __call__(self, step: StepResult) -> None:
        comparison = self._stragglers.compare(self._run.step)
        if comparison is not None:
            self._log.ranks(comparison, self._run.images)


class LogLine:
    """Print a log line and write scalars and routing statistics to TensorBoard; after the first line, host memory."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self._run, self._log = run, log
        self._due = Interval(run.config.run.log_every_images, run.images)
        self._is_first = True
        self._idle = IdleExperts(run.config.routing.kind)

    def __call__(self, step: StepResult) -> None:
        if not (self._due(self._run.images) or self._run.is_complete):
            return
        if step.routing:
            report, layers = routing_report(step.routing, step.noise_level_B), self._run.model.moe_layers()
            self._log.routing(report, layers, self._run.images)
            warning = self._idle.warning(report.load_LE, list(layers))
            if warning is not None and self._run.is_main:
                print(f"*** WARNING: {warning} ***", file=sys.stderr, flush=True)
        self._log.line()
        if self._is_first:
            self._is_first = False
            self._log.host_memory(gather_host_memory(self._run.device), self._run.images)


class Validate:
    """Evaluate the averaged weights on held-out images.

    It runs before `Save`, so that a run killed during an evaluation resumes before it and repeats it.
    """

    def __init__(self, run: Run, log: RunLog, checkpointer: Checkpointer, watchdog: Watchdog) -> None:
        self._run, self._log, self._checkpointer = run, log, checkpointer
        self._validation = None if run.held_out is None else Validation(run, run.held_out, watchdog)
        self._due = Interval(run.config.eval.every_images, run.images)

    def __call__(self, step: StepResult) -> None:
        if self._validation is None or not (self._due(self._run.images) or self._run.is_complete):
            return
        try:
            row = self._validation.evaluate()
        except DiffMoEError:  # on all ranks
            self._log.settle()
            self._checkpointer.save_before_exit()  # training itself has not failed
            raise
        self._log.evaluation(row)
        self._log.pause()


class Save:
    """Save a checkpoint."""

    def __init__(self, run: Run, log: RunLog, checkpointer: Checkpointer) -> None:
        self._run, self._log, self._checkpointer = run, log, checkpointer
        self._due = Interval(run.config.run.save_every_images, run.images)

    def __call__(self, step: StepResult) -> None:
        if self._due(self._run.images) or self._run.is_complete:
            self._log.settle()  # no checkpoint without the rows of its steps
            self._checkpointer.start(wait=self._run.is_complete)


class SampleGrid:
    """Generate a grid of samples from the averaged weights, for TensorBoard and ``samples/``."""

    def __init__(self, run: Run, log: RunLog, watchdog: Watchdog) -> None:
        self._run, self._log = run, log
        self._preview = Preview(run, watchdog)
        self._period = run.config.run.sample_every_images
        self._due = Interval(self._period, run.images)

    def __call__(self, step: StepResult) -> None:
        if not (self._due(self._run.images) or (self._period and self._run.is_complete)):
            return
        grid = self._preview.generate()
        if grid is not None:
            self._log.image("samples", grid, self._run.images)
            self._write_png(grid)
        self._log.pause()

    def _write_png(self, grid_HWC: np.ndarray) -> None:
        folder, own = self._run.directory / "samples", self._run.owner.directory(self._run.directory)
        path = folder / f"images_{self._run.images:012d}.png"
        try:
            require_owned(own)
            make_directory(folder, own)
            with replacing(path, own) as tmp:
                save_png(grid_HWC, tmp)
        except OSError as error:  # a failed preview must not end the run
            print(f"*** WARNING: {path}: cannot be written: {error.strerror or error} ***", file=sys.stderr, flush=True)
