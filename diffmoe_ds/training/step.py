"""One optimizer step: noise, forward, backward, update, EMA.  The loop around it is `training/loop.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.collectives import mean_over_ranks
from diffmoe_ds.distributed.stragglers import Stragglers
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import NonFiniteError
from diffmoe_ds.moe.layer import Routing
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.checkpointer import Checkpointer
from diffmoe_ds.training.loss import Losses, forward
from diffmoe_ds.training.nonfinite import locate_in_backward, locate_in_forward
from diffmoe_ds.training.run_log import RunLog
from diffmoe_ds.training.setup import Run


class StepResult(NamedTuple):
    """Results of one optimizer step."""

    losses: Losses
    """Means over micro-steps and ranks."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    lr: float
    """The learning rate that was used."""
    routing: tuple[Routing, ...]
    """Routing of the last micro-step on this rank, one entry per MoE layer."""
    noise_level_B: Tensor
    """The noise levels of the last micro-step's images, in [0, 1]."""


def train_step(
    run: Run, batch: MicroBatch, batches: BatchSource, watchdog: Watchdog, stragglers: Stragglers
) -> StepResult:
    """Run the micro-steps of one optimizer step, then update the weights, thresholds and EMA.

    Args:
        run: the run.
        batch: the first micro-batch.
        batches: source of the remaining micro-batches.
        watchdog: ticked after each micro-step.
        stragglers: measures this rank's own work.

    Raises:
        NonFiniteError: on all ranks, if the loss or a gradient is non-finite; the weights are unchanged.
    """
    accumulation = run.settings.accumulation
    totals = torch.zeros(len(Losses._fields), device=run.device)
    micro_batches: list[MicroBatch] = []
    problem = ""
    while len(micro_batches) < accumulation:
        with stragglers.own_work(run.step):
            if micro_batches:
                batch, *_ = batches.fetch()
            micro_batches.append(batch)
            output, losses, t_B = forward(run, run.engine, batch)
        is_last = len(micro_batches) == accumulation
        totals += torch.stack([loss.detach().float() for loss in losses]) / accumulation
        loss = losses.total
        if is_last:
            totals = mean_over_ranks(totals)
            if not totals.isfinite().all():
                problem = f"the loss is {totals[0].item()} {locate_in_forward(run, micro_batches)}"
                loss = loss * float("nan")  # makes DeepSpeed discard the gradient
        run.engine.backward(loss)
        if not is_last:
            run.engine.step()  # DeepSpeed counts micro-steps here; it updates at the last one only
        run.thresholds.observe(output.routing)
        watchdog.tick()
    lr = run.engine.get_lr()[0]
    grad_norm = seam.step(run.engine, run.settings.gradient_clipping)
    if not math.isfinite(grad_norm):
        _discard(run, problem or f"non-finite gradient {locate_in_backward(run, micro_batches)}")
    run.thresholds.update()
    run.ema.update()
    watchdog.tick()
    return StepResult(Losses(*totals), grad_norm, lr, output.routing, run.objective.noise_level(t_B))


def _discard(run: Run, problem: str) -> None:
    """Discard a non-finite step and raise."""
    run.thresholds.discard()
    raise NonFiniteError(
        f"{problem}, at step {run.step + 1} ({run.images:,} images seen); the weights were not changed. Lower the "
        "learning rate, set gradient_clipping in the DeepSpeed JSON, or allow run.nonfinite_skips."
    )


class SkippedSteps:
    """Counts consecutive non-finite steps, which are skipped."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self._run = run
        self._log = log
        self._in_a_row = 0

    def count(self, error: NonFiniteError, checkpointer: Checkpointer) -> None:
        """Skip the images of a non-finite step; raise the error after too many consecutive ones."""
        self._in_a_row += 1
        allowed = self._run.config.run.nonfinite_skips
        if self._in_a_row > allowed:
            checkpointer.complete()
            raise error
        self._run.images += self._run.settings.global_batch
        self._log.skipped(f"{error} ({self._in_a_row} of {allowed} in a row)")

    def reset(self) -> None:
        """Reset the count after a finite step."""
        self._in_a_row = 0
