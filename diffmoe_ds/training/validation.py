"""Evaluation during training: the averaged weights on held-out images, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DiffMoEError
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.evaluation.validation_loss import validation_loss
from diffmoe_ds.training.averaged import averaged_model
from diffmoe_ds.training.batches import as_data_error
from diffmoe_ds.training.setup import Run


class Validation:
    """Evaluates with a second model, which exists only during an evaluation."""

    def __init__(self, run: Run, held_out: HeldOut, watchdog: Watchdog) -> None:
        self._run = run
        self._held_out = held_out
        self._watchdog = watchdog

    def evaluate(self) -> dict[str, Any]:
        """Return the row of ``validation.jsonl`` for the current weights. Every rank must call this.

        Numbers that are non-finite or not defined, such as the loss of a noise level without images, are None.

        Raises:
            DataError: on all ranks, if any could not read its held-out images.
        """
        run = self._run
        model = averaged_model(run)
        loss = validation_loss(model, run.objective, self._batches(), len(self._held_out), all_reduce)
        return {
            "step": run.step,
            "images": run.images,
            "validation_loss": _finite(loss.mean),
            "validation_loss_by_noise_level": [_finite(value) for value in loss.by_noise_level],
            "validation_images": loss.images,
            "routing": run.config.inference_choices[0],
        }

    def _batches(self) -> Iterator[MicroBatch]:
        """Read this rank's share of the images; if any rank fails, all raise."""
        run, topology = self._run, self._run.topology
        share = self._held_out.batches(run.settings.micro_batch, topology.rank, topology.world)
        if self._encode is not None:
            share = self._encode(share)
        while (batch := raise_on_all_ranks(run.device, lambda: _read(share))) is not None:
            yield batch
            self._watchdog.tick()  # all ranks read the same number of batches

    @cached_property
    def _encode(self) -> Any:
        """The function that encodes batches of pixels into latents; None if the held-out images need no encoding."""
        path = self._run.config.data.vae
        if path is None:
            return None
        from diffmoe_ds.data.vae import VAE, EncodingLoader  # imports diffusers, an extra

        vae = raise_on_all_ranks(self._run.device, lambda: VAE(path, self._run.device))
        return lambda batches: iter(EncodingLoader(batches, vae))


def _read(batches: Iterator[MicroBatch]) -> MicroBatch | None:
    """Return the next batch, None after the last one; all errors are reported as errors of the data."""
    try:
        return next(batches, None)
    except DiffMoEError:
        raise
    except Exception as error:
        raise as_data_error(error) from error


def _finite(value: float) -> float | None:
    """Return a number as strict JSON can hold it."""
    return value if math.isfinite(value) else None
