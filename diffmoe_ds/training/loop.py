"""The training loop: read, corrupt, predict, step, average, tell, save."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from diffmoe_ds.data.dataset import image_shape
from diffmoe_ds.data.loader import MicroBatch, PositionLoader
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.collectives import WAITING
from diffmoe_ds.distributed.stragglers import Stragglers
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DataError, NonFiniteError, Requeue
from diffmoe_ds.moe.layer import Routing
from diffmoe_ds.rng import training_draws
from diffmoe_ds.sampling.generate import save_png
from diffmoe_ds.training.checkpointer import Every, Saves
from diffmoe_ds.training.loss import Losses, training_loss
from diffmoe_ds.training.metrics import MetricsWriter, routing_report
from diffmoe_ds.training.nonfinite import GradientWatch, blame_forward
from diffmoe_ds.training.preview import Preview
from diffmoe_ds.training.setup import Run, mean_over_ranks


class Step(NamedTuple):
    """What an optimizer step leaves to tell."""

    losses: Losses
    """Means over micro-steps and ranks."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The learning rate that it used."""
    last: tuple[tuple[Routing, ...], torch.Tensor]
    """What its last forward pass routed, and the noise level of those images."""


def train(
    run: Run, dataset: Dataset, metrics: MetricsWriter | None, watchdog: Watchdog, hosts: tuple[str, ...]
) -> Path | None:
    """Train until the run's images are seen.

    Args:
        run: from `setup_run`.
        dataset: the images.
        metrics: rank 0's writer.
        watchdog: is told that this rank goes on.
        hosts: the host of every rank.

    Returns:
        The last checkpoint written; none if there was nothing left to do.

    Raises:
        Requeue: a signal asked to stop; everything is saved.
        NonFiniteError: the loss or a gradient is no number; the weights are those before the step.
        DataError, CheckpointError: see the data and checkpoint packages.
    """
    config, global_batch = run.config, run.settings.global_batch
    batches = Timed(iter(make_loader(run, dataset)))
    saves = Saves(run, watchdog)
    stragglers = Stragglers(config.run.straggler_steps, config.run.straggler_ratio, hosts, run.device)
    watch, preview, skipped = GradientWatch(run.model), Preview(), 0
    due = {
        "line": Every(config.run.log_every_images, run.images),
        "save": Every(config.run.save_every_images, run.images),
        "grid": Every(config.run.sample_every_images, run.images),
    }
    while run.images < config.run.total_images:
        watchdog.tick(run.step)
        with stragglers.own_work(run.step):
            batch, stop, writing = _next_batch(run, batches, bool(signals.received()), saves.is_writing)
        if saves.is_open and not writing:
            saves.finish()
        if stop:
            raise Requeue(f"asked to stop ({signals.received() or 'another rank was'}); {saves.last_words()}")
        try:
            step = _step(run, batch, batches, watch, watchdog, stragglers)
        except NonFiniteError as error:
            skipped += 1
            if skipped > config.run.nonfinite_skips:
                saves.complete()
                raise
            run.images += global_batch
            if metrics is not None:
                print(f"{'skipped':>11}  {error} ({skipped} of {config.run.nonfinite_skips} in a row)", flush=True)
            continue
        skipped = 0
        run.images += global_batch
        run.step += 1
        is_last = run.images >= config.run.total_images
        if metrics is not None:
            metrics.step({**_row(run, step), "data_s": batches.waited()})
        compared = stragglers.compare(run.step)
        if metrics is not None and compared is not None:
            metrics.compared(compared, run.images)
        if due["line"](run.images) or is_last:
            report = routing_report(*step.last) if step.last[0] else None
            if metrics is not None:
                if report is not None:
                    metrics.routing(report, run.model, run.images)
                print(metrics.line(), flush=True)
        if due["save"](run.images) or is_last:
            saves.start(wait=is_last)
        if due["grid"](run.images) or (is_last and config.run.sample_every_images):
            grid = preview.draw(run, watchdog)
            if metrics is not None:
                _show(run, grid, metrics)
                metrics.pause()
    saves.save_rest()  # the last step may have been skipped
    return saves.last


def make_loader(run: Run, dataset: Dataset) -> Iterable[MicroBatch]:
    """This rank's images from where the run stands."""
    data, model, settings = run.config.data, run.config.model, run.settings
    shape = (model.in_channels, model.input_size, model.input_size)
    draws = partial(
        training_draws,
        run.config.run.seed,
        shape=shape,
        label_dropout=model.label_dropout,
        flip=data.horizontal_flip,
        posterior=dataset.latents is not None or data.vae is not None,
    )
    loader = PositionLoader(
        dataset=dataset,
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
        draws=draws,
    )
    if data.vae is None:
        return loader
    from diffmoe_ds.data.vae import VAE, EncodingLoader

    return EncodingLoader(loader, VAE(data.vae, run.device))


def _step(
    run: Run,
    batch: MicroBatch,
    batches: Iterator[MicroBatch],
    watch: GradientWatch,
    watchdog: Watchdog,
    stragglers: Stragglers,
) -> Step:
    """All micro-steps, then the optimizer step and what follows it once per step.

    Raises:
        NonFiniteError: on all ranks; the update did not take place.
    """
    accumulation = run.settings.accumulation
    totals = torch.zeros(len(Losses._fields), device=run.device)
    problem, seen = "", []
    watch.forget()
    for micro_step in range(accumulation):
        with stragglers.own_work(run.step):
            if micro_step:
                batch = _next_batch(run, batches, False, False)[0]
            t_B = run.objective.model_time(batch.time)
            inputs = (run.objective.corrupt(batch.x, batch.noise, t_B), t_B, batch.label, batch.drop)
            seen.append(inputs)
            output = run.engine(*inputs)
            losses = training_loss(output, batch, t_B, run.objective, run.config)
        totals += torch.stack([loss.detach().float() for loss in losses]) / accumulation
        total = losses.total
        if micro_step + 1 == accumulation:
            totals = mean_over_ranks(totals)
            if not totals.isfinite().all():
                problem = f"the loss is {totals[0].item()} " + _blame(run, seen)
                total = total * float("nan")  # so that DeepSpeed finds no gradient to apply, whatever the loss gave
        run.engine.backward(total)
        if micro_step + 1 < accumulation:
            run.engine.step()  # DeepSpeed counts micro-steps here; it updates at the last one only
        run.thresholds.observe(output.routing)
        watchdog.tick()
    lr = run.engine.get_lr()[0]
    grad_norm = seam.step(run.engine, run.settings.gradient_clipping)
    if not math.isfinite(grad_norm):
        run.thresholds.discard()
        problem = problem or "a gradient is not finite " + watch.blame(run.topology.rank, run.device)
        raise NonFiniteError(
            f"{problem}, at step {run.step + 1} ({run.images:,} images seen); the weights were not changed. Lower the "
            "learning rate, set gradient_clipping in the DeepSpeed JSON, or allow run.nonfinite_skips."
        )
    run.thresholds.update()
    run.ema.update()
    watchdog.tick()
    return Step(Losses(*totals), grad_norm, lr, (output.routing, run.objective.noise_level(t_B)))


def _blame(run: Run, seen: list[tuple[torch.Tensor, ...]]) -> str:
    """The first micro-step's rank and layer that gave something non-finite, in words; every rank must call."""
    for inputs in seen:
        where = blame_forward(run.engine, inputs, run.topology.rank)
        if where is not None:
            return where
    return "in the loss itself, not in any layer"


def _next_batch(run: Run, batches: Iterator[MicroBatch], stop: bool, writing: bool) -> tuple[MicroBatch, bool, bool]:
    """This rank's next images, and whether any rank was asked to stop or still writes a checkpoint.

    If any rank cannot read its images, all leave together instead of waiting for it.
    """
    failure = None
    try:
        batch = next(batches)
    except DataError as error:
        failure = error
    except Exception as error:  # a loader process was killed, memory ran out, a file system went away
        failure = DataError(f"the images cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")
    flags = torch.tensor([failure is not None, stop, writing], dtype=torch.int32, device=run.device)
    with WAITING:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    failed, stop, writing = map(bool, flags.tolist())
    if failure is not None:
        raise failure
    if failed:
        raise DataError(f"rank {run.topology.rank} stops because another rank could not read its images")
    return batch.to(run.device), stop, writing


def _row(run: Run, step: Step) -> dict[str, Any]:
    losses = step.losses
    row = {
        "step": run.step,
        "images": run.images,
        "loss": losses.total.item(),
        "diffusion_loss": losses.diffusion.item(),
        "capacity_loss": losses.capacity.item(),
        "grad_norm": step.grad_norm,
        "lr": step.lr,
    }
    if run.config.routing.kind == "token_choice":
        row["balance_loss"] = losses.balance.item()
    return row


def _show(run: Run, grid: Any, metrics: MetricsWriter) -> None:
    metrics.image("samples", grid, run.images)
    folder = run.directory / "samples"
    try:
        folder.mkdir(exist_ok=True)
        save_png(grid, str(folder / f"images_{run.images:012d}.png"), scale=max(1, math.ceil(600 / grid.shape[1])))
    except OSError as error:  # a picture is not worth a run
        print(f"*** WARNING: {folder}: {error}; the picture is not there ***", file=sys.stderr, flush=True)


class Timed:
    """An iterator that knows how long one waited for it."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self._seconds = 0.0

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - start

    def waited(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return round(seconds, 6)
