"""A grid of samples from the averaged weights while the run goes on, drawn by all ranks together."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, draw, grid_columns, make_grid, to_uint8
from diffmoe_ds.training.setup import Run, build_model


class Preview:
    """Keeps a second copy of this rank's weights, made at the first grid, for the averaged ones."""

    def __init__(self) -> None:
        self._model: DiT | None = None

    def draw(self, run: Run, watchdog: Watchdog) -> np.ndarray | None:
        """A grid, uint8 [height, width, 3], on rank 0; none on the others.  Every rank must call."""
        if self._model is None:
            self._model = build_model(run.config, run.topology).to(run.device).eval()
            self._model.set_inference(run.config.inference_choices[0])
        run.ema.copy_to(self._model, run.model)
        sample, world = run.config.sample, run.topology.world
        share = math.ceil(sample.num_images / world)
        first = run.topology.rank * share
        seeds = range(first, first + share)
        labels = torch.tensor([seed % run.config.model.num_classes for seed in seeds], device=run.device)
        images = draw(
            self._model,
            labels,
            seeds,
            sampler=sample.sampler or run.objective.samplers[0],
            steps=sample.steps,
            cfg_scale=sample.cfg_scale,
            progress=lambda done, total: watchdog.tick(),
        )
        if run.config.model.in_channels not in PIXEL_CHANNELS:
            images = images[:, :3] / 4  # a latent's first channels, roughly in range: enough to see it come alive
        every = [torch.empty_like(images) for _ in range(world)]
        dist.all_gather(every, images.contiguous())
        if not run.is_main:
            return None
        pixels = to_uint8(torch.cat(every))
        return make_grid(pixels, grid_columns(len(pixels), run.config.model.num_classes))
