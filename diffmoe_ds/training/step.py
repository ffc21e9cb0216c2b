"""One optimizer step: noise, forward, backward, update, EMA.  The loop around it is `training/loop.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.stragglers import Stragglers
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import NonFiniteError
from diffmoe_ds.model.dit import DiTOutput
from diffmoe_ds.moe.layer import Routing, exact_dispatch
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.checkpointer import Checkpointer
from diffmoe_ds.training.loss import Losses, forward
from diffmoe_ds.training.nonfinite import locate_in_backward, locate_in_forward
from diffmoe_ds.training.run_log import RunLog
from diffmoe_ds.training.setup import Run


class MeanLosses(NamedTuple):
    """`Losses`, averaged over the micro-steps of a step and over the ranks."""

    total: float
    diffusion: float
    capacity: float
    alignment: float
    balance: float
    z: float
    orthogonality: float
    contrastive: float
    similarity: float
    per_layer: float


class StepResult(NamedTuple):
    """Results of one optimizer step."""

    losses: MeanLosses
    """On the host."""
    grad_norm: Tensor | float
    """Global 2-norm of the gradient before clipping, possibly on the device."""
    lr: float
    """The learning rate that was used."""
    routing: tuple[Routing, ...]
    """Routing of the last micro-step on this rank, one entry per MoE layer."""
    noise_level_B: Tensor
    """The noise levels of the last micro-step's images, in [0, 1]."""
    redone: int
    """Micro-steps whose forward pass was repeated; see ``routing.padded_dispatch``."""


class _ForwardResult(NamedTuple):
    """A micro-batch after its forward pass."""

    output: DiTOutput
    losses: Losses
    t_B: Tensor


SEARCH_INCONCLUSIVE, PASS_INVALID = len(Losses._fields), len(Losses._fields) + 1
"""Indices, after the losses, of the values that the ranks agree on."""


def train_step(
    run: Run, batches: BatchSource, flags: Callable[[], tuple[bool, ...]], watchdog: Watchdog, stragglers: Stragglers
) -> StepResult:
    """Run the micro-steps of one optimizer step, then update the weights, the routers' state and the EMA.

    Args:
        run: the run.
        batches: source of the micro-batches.
        flags: this rank's answers, on which the ranks agree together with the losses; see `BatchSource.flags`.
        watchdog: ticked after each micro-step.
        stragglers: measures this rank's own work.

    Raises:
        NonFiniteError: on all ranks, if the loss or a gradient is non-finite; the weights are unchanged.
        DataError: on all ranks, if any could not read its images; the weights are unchanged.
    """
    accumulation = run.settings.accumulation
    means = [0.0] * len(MeanLosses._fields)
    micro_batches: list[MicroBatch] = []
    problem, redone = "", 0
    while len(micro_batches) < accumulation:
        with stragglers.own_work(run.step):
            micro_batches.append(batches.take())
            is_last = len(micro_batches) == accumulation
            passed, agreed, is_redone = _agreed_forward(run, batches, flags, micro_batches[-1], is_last)
        redone += is_redone
        means = [mean + value / accumulation for mean, value in zip(means, agreed[:SEARCH_INCONCLUSIVE], strict=True)]
        loss = passed.losses.total
        if is_last and not all(map(math.isfinite, means)):
            problem = f"the loss is {means[0]} {locate_in_forward(run, micro_batches)}"
            loss = loss * float("nan")  # makes DeepSpeed discard the gradient
        run.engine.backward(loss)
        if not is_last:
            run.engine.step()  # DeepSpeed counts micro-steps here; it updates at the last one only
        watchdog.tick()
    lr = run.engine.get_lr()[0]
    grad_norm = seam.step(run.engine, run.settings.gradient_clipping)
    if grad_norm is None:
        _discard(run, problem or f"non-finite gradient {locate_in_backward(run, micro_batches)}")
    run.thresholds.update(agreed[SEARCH_INCONCLUSIVE] > 0, batches.attachments_WX)
    for state in run.router_states:
        state.update()
    run.ema.update(run.config.ema.decay_after(run.step))
    watchdog.tick()
    noise_level_B = run.objective.noise_level(passed.t_B)
    return StepResult(MeanLosses(*means), grad_norm, lr, passed.output.routing, noise_level_B, redone)


def _agreed_forward(
    run: Run, batches: BatchSource, flags: Callable[[], tuple[bool, ...]], batch: MicroBatch, is_last: bool
) -> tuple[_ForwardResult, list[float], bool]:
    """Run a micro-batch forward; repeat it with exact dispatch if any rank lost rows or has an inconclusive selection.

    Nothing depends on the first pass yet: gradients are reduced in the backward pass.

    Returns:
        The results; the mean over the ranks of each value of `_forward`; and whether the pass was repeated.
    """
    passed, values = _forward(run, batch, is_last)
    agreed = batches.agree(flags(), values, run.thresholds.attachment)
    if not any(agreed[PASS_INVALID:]):
        return passed, agreed, False
    del passed  # frees its graph
    run.thresholds.retract()
    for state in run.router_states:
        state.retract()
    with exact_dispatch(run.model.moe_layers().values()):
        passed, values = _forward(run, batch, is_last)
    return passed, batches.agree_again(values, run.thresholds.attachment), True


def _forward(run: Run, batch: MicroBatch, is_last: bool) -> tuple[_ForwardResult, Tensor]:
    """Run a micro-batch forward, and search the thresholds after the last one of a step.

    Returns:
        The results, and fp32 values on which the ranks agree: the losses; whether the search must be repeated; with
        padded dispatch, in how many layers this rank lost rows or has a wrong selection, so the pass must be redone.
    """
    output, losses, t_B = forward(run, run.engine, batch)
    run.thresholds.observe(output.routing)
    for state in run.router_states:
        state.observe(output.routing)
    values = [loss.detach().float() for loss in losses]
    repeat = run.thresholds.search() if is_last else None
    values.append(torch.zeros_like(values[0]) if repeat is None else repeat)
    redo = [routing.must_redo for routing in output.routing if routing.must_redo is not None]
    if redo:
        values.append(torch.stack(redo).sum().float())
    return _ForwardResult(output, losses, t_B), torch.stack(values)


def _discard(run: Run, problem: str) -> NoReturn:
    """Discard a non-finite step and raise."""
    run.thresholds.discard()
    for state in run.router_states:
        state.discard()
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
            self._log.settle()
            checkpointer.save_before_exit()
            raise error
        self._run.images += self._run.settings.global_batch
        self._log.skipped(f"{error} ({self._in_a_row} of {allowed} in a row)")

    def reset(self) -> None:
        """Reset the count after a finite step."""
        self._in_a_row = 0
