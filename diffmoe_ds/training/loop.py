"""The training loop: read, corrupt, predict, step, average, tell, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffmoe_ds.checkpoint.save import save_checkpoint
from diffmoe_ds.config.load import config_to_dict
from diffmoe_ds.data.dataset import image_shape
from diffmoe_ds.data.draws import training_draws
from diffmoe_ds.data.loader import MicroBatch, PositionLoader
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.errors import DataError, NonFiniteError
from diffmoe_ds.model.moe import Routing
from diffmoe_ds.parallel import deepspeed_seam as seam
from diffmoe_ds.sampling import save_png
from diffmoe_ds.training.loss import Losses, training_loss
from diffmoe_ds.training.metrics import MetricsWriter, routing_report
from diffmoe_ds.training.preview import Preview
from diffmoe_ds.training.setup import Run, mean_over_ranks

LAST_MICRO_STEP = tuple[tuple[Routing, ...], torch.Tensor]
"""What the last forward pass of a step routed, and the noise level of its images."""


def train(run: Run, dataset: Dataset, metrics: MetricsWriter | None) -> Path | None:
    """Train until the run's images are seen.

    Args:
        run: from `setup_run`.
        dataset: the images.
        metrics: rank 0's writer.

    Returns:
        The last checkpoint written; none if there was nothing left to do.

    Raises:
        NonFiniteError: the loss is no number; the weights are those before the step.
        DataError, CheckpointError: see the data and checkpoint packages.
    """
    config, global_batch = run.config, run.settings.global_batch
    batches = _Timed(iter(make_loader(run, dataset)))
    preview, saved = Preview(), None
    due = {
        "line": _Every(config.run.log_every_images, run.images),
        "save": _Every(config.run.save_every_images, run.images),
        "grid": _Every(config.run.sample_every_images, run.images),
    }
    while run.images < config.run.total_images:
        losses, last = _forward_backward(run, batches)
        grad_norm = _update(run, losses)
        run.images += global_batch
        run.step += 1
        if metrics is not None:
            metrics.step({**_row(run, losses, grad_norm), "data_s": batches.waited()})
        is_last = run.images >= config.run.total_images
        if due["line"](run.images) or is_last:
            report = routing_report(*last) if last[0] else None
            if metrics is not None:
                if report is not None:
                    metrics.routing(report, run.model, run.images)
                print(metrics.line(), flush=True)
        if due["grid"](run.images) or (is_last and config.run.sample_every_images):
            grid = preview.draw(run)
            if metrics is not None:
                _show(run, grid, metrics)
                metrics.pause()
        if due["save"](run.images) or is_last:
            saved = save(run)
            if metrics is not None:
                print(f"{'saved':>11} {saved}", flush=True)
                metrics.pause()
    return saved


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


def save(run: Run) -> Path:
    """Write a checkpoint of the run; every rank must call."""
    scheduler = run.engine.lr_scheduler
    parts = run.ema.parts
    return save_checkpoint(
        run.directory,
        run.ema.fragments,
        run.ema.values,
        {name: buffer for name, buffer in run.model.named_buffers() if name != "pos_embed"},
        {
            "images": run.images,
            "step": run.step,
            "adam_step": seam.adam_step(run.engine),
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "shapes": {name: part.logical_shape for name, part in parts.items()},
            "layout": {
                "world": run.topology.world,
                "ep_size": run.topology.ep_size,
                "zero_stage": run.settings.zero_stage,
                "global_batch": run.settings.global_batch,
            },
            "config": config_to_dict(run.config),
        },
    )


def _forward_backward(run: Run, batches: Iterator[MicroBatch]) -> tuple[Losses, LAST_MICRO_STEP]:
    """All micro-steps of a step; losses are means over micro-steps and ranks."""
    totals = torch.zeros(len(Losses._fields), device=run.device)
    for micro_step in range(run.settings.accumulation):
        batch = _next_batch(run, batches)
        t_B = run.objective.model_time(batch.time)
        noisy = run.objective.corrupt(batch.x, batch.noise, t_B)
        output = run.engine(noisy, t_B, batch.label, batch.drop)
        losses = training_loss(output, batch, t_B, run.objective, run.config)
        totals += torch.stack([loss.detach().float() for loss in losses]) / run.settings.accumulation
        if micro_step + 1 == run.settings.accumulation:
            totals = mean_over_ranks(totals)
            _check_finite(run, totals)
        run.engine.backward(losses.total)
        if micro_step + 1 < run.settings.accumulation:
            run.engine.step()  # DeepSpeed counts micro-steps here; it updates at the last one only
        run.thresholds.observe(output.routing)
    return Losses(*totals), (output.routing, run.objective.noise_level(t_B))


def _next_batch(run: Run, batches: Iterator[MicroBatch]) -> MicroBatch:
    """This rank's next images; if any rank cannot read its own, all leave together instead of waiting for it."""
    failure = None
    try:
        batch = next(batches)
    except DataError as error:
        failure = error
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=run.device)
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.item():
        raise DataError(f"rank {run.topology.rank} stops because another rank could not read its images")
    return batch.to(run.device)


def _check_finite(run: Run, totals: torch.Tensor) -> None:
    if not totals.isfinite().all():
        raise NonFiniteError(
            f"the loss is {totals[0].item()} at step {run.step + 1} ({run.images:,} images seen); the weights were not "
            "changed. Lower the learning rate, or set gradient_clipping in the DeepSpeed JSON."
        )


def _update(run: Run, losses: Losses) -> float:
    """The optimizer step and what follows it once per step; returns the gradient's norm."""
    if run.settings.zero_stage == 0:
        norm = seam.clip_unpartitioned(run.engine, run.settings.gradient_clipping)
        run.engine.step()
    else:
        run.engine.step()
        norm = float(run.engine.get_global_grad_norm())
    run.thresholds.update()
    run.ema.update()
    return norm


def _row(run: Run, losses: Losses, grad_norm: float) -> dict[str, Any]:
    row = {
        "step": run.step,
        "images": run.images,
        "loss": losses.total.item(),
        "diffusion_loss": losses.diffusion.item(),
        "capacity_loss": losses.capacity.item(),
        "grad_norm": grad_norm,
        "lr": run.engine.get_lr()[0],
    }
    if run.config.routing.kind == "token_choice":
        row["balance_loss"] = losses.balance.item()
    return row


def _show(run: Run, grid: Any, metrics: MetricsWriter) -> None:
    metrics.image("samples", grid, run.images)
    folder = run.directory / "samples"
    folder.mkdir(exist_ok=True)
    save_png(grid, str(folder / f"images_{run.images:012d}.png"), scale=max(1, math.ceil(600 / grid.shape[1])))


class _Timed:
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


class _Every:
    """True when a multiple of ``period`` images was passed since the last call; a period of 0 never is."""

    def __init__(self, period: int, images: int) -> None:
        self._period = period
        self._images = images

    def __call__(self, images: int) -> bool:
        before, self._images = self._images, images
        return self._period > 0 and images // self._period > before // self._period
