"""Images that a model generates on demand for ``diffmoe evaluate``, without writing files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.cli.capacity import used_capacity
from diffmoe_ds.cli.evaluate_loss import loss_of
from diffmoe_ds.cli.sample_model import load_generator
from diffmoe_ds.cli.sample_set import Generate
from diffmoe_ds.cli.sampling_plan import SamplingPlan, describe, dtype_of
from diffmoe_ds.data.vae import downsampling, vae_settings
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.evaluation.evaluate import Team
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.sampling.observer import CapacityMeter, observing
from diffmoe_ds.text import counted

T = TypeVar("T")


class GeneratedImages:
    """The images of a sampling plan; implements `Images`."""

    def __init__(self, plan: SamplingPlan) -> None:
        """Plan the images; `load` must be called before `batches`.

        Args:
            plan: the model, its sampler and the images.

        Raises:
            ConfigError: there are fewer than 2 images.
        """
        self._plan = plan
        self._model: DiT | None = None
        self._generate: Generate | None = None
        self._meter: CapacityMeter | None = None
        side = plan.reader.config.model.input_size
        if plan.vae is not None:
            side *= downsampling(vae_settings(plan.vae))
        self.size = side, side
        if len(self) < 2:
            raise ConfigError(f"{counted(len(self), 'image')} to generate; metrics need at least 2.")

    def __len__(self) -> int:
        return self._plan.images.num_images

    @property
    def reader(self) -> WeightsReader:
        """The model's weights."""
        return self._plan.reader

    @property
    def together(self) -> int:
        """Number of images that must share a batch because they compete; ranks share whole batches of this size."""
        return self._plan.batch_size if self._plan.images_compete else 1

    def prompts(self) -> list[str] | None:
        """Return the prompt of each image; None for a model of classes."""
        images = self._plan.images
        if images.prompts is None:
            return None
        return [images.prompts.texts[label] for label in images.labels_of(range(len(self))).tolist()]

    def load(self, device: torch.device, rendezvous: Rendezvous) -> None:
        """Load the model. Every rank must call this.

        Raises:
            DiffMoEError: on all ranks, if any rank cannot load its part.
        """
        set_tf32(True)
        with redirect_stdout(sys.stderr):  # stdout holds only the result
            if self._plan.topology.rank == 0:
                print(describe(self._plan, dtype_of(self._plan, device)), flush=True)
            self._model, self._generate = load_generator(self._plan, device, rendezvous)
        self._meter = CapacityMeter(self._model)
        set_tf32(False)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [B, C, H, W].

        Raises:
            NonFiniteError: an image contains NaN or Inf.
        """
        assert self._model is not None and self._generate is not None and self._meter is not None, "load() comes first"
        for first in range(start, stop, batch_size):
            set_tf32(True)  # as `diffmoe sample` does
            with observing(self._model, self._meter):
                pixels = self._generate(range(first, min(first + batch_size, stop)), lambda done, total: None)
            set_tf32(False)  # features are in full fp32
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def capacity(self, team: Team) -> float | None:
        """Return the experts per token over all generated images; None for a dense model.

        Every rank must call this.
        """
        assert self._meter is not None, "load() comes first"
        used_L = used_capacity(self._meter, team.world)
        return None if used_L is None else float(used_L.mean())

    def validation_loss(self, held_out: HeldOut, team: Team) -> dict[str, Any]:
        """Return the model's loss on held-out images; see `loss_of`."""
        assert self._model is not None, "load() comes first"
        return loss_of(self._model, held_out, self._plan.batch_size, team)
