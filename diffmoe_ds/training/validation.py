"""Evaluation of the averaged weights on held-out images during training, by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.evaluation.table import finite_or_none
from diffmoe_ds.evaluation.validation_loss import validation_loss
from diffmoe_ds.training.averaged import averaged_model
from diffmoe_ds.training.batches import load_vae
from diffmoe_ds.training.lockstep import lockstep, num_batches, reading
from diffmoe_ds.training.online_metrics import OnlineMetrics
from diffmoe_ds.training.setup import Run


class Validation:
    """Evaluates with a second model, which exists only during an evaluation."""

    def __init__(self, run: Run, held_out: HeldOut, watchdog: Watchdog) -> None:
        self._run = run
        self._objective = make_objective(run.config.objective.kind)
        """Without the weights of min-SNR, so that losses of all runs compare."""
        self._held_out = held_out
        self._watchdog = watchdog
        self._metrics = OnlineMetrics(run, held_out, watchdog) if run.config.eval.metrics else None

    def evaluate(self) -> dict[str, Any]:
        """Return the row of ``validation.jsonl`` for the current weights. Every rank must call this.

        Numbers that are non-finite or undefined, such as the loss of an empty noise-level bin, are None.

        Raises:
            DiffMoEError: on all ranks, if any rank cannot read its held-out images or compute the metrics.
        """
        run, held_out = self._run, self._held_out
        model = averaged_model(run)
        loss = validation_loss(model, self._objective, self._batches(), len(held_out), all_reduce)
        row = {
            "step": run.step,
            "images": run.images,
            "validation_loss": loss.mean,
            "validation_loss_by_noise_level": list(loss.by_noise_level),
            "validation_images": loss.images,
            "routing": run.config.inference_choices[0],
        }
        if self._metrics is not None:
            row["metrics"] = self._metrics.compute(model)
        found: dict[str, Any] = finite_or_none(row)
        return found

    def _batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share of the images."""
        run, topology, held_out = self._run, self._run.topology, self._held_out
        share = reading(held_out.batches(run.settings.micro_batch, topology.rank, topology.world))
        path = run.config.data.vae
        if path is not None:
            from diffmoe_ds.data.vae import EncodingLoader  # imports diffusers, an extra

            vae = raise_on_all_ranks(run.device, lambda: load_vae(path, run.device))
            share = iter(EncodingLoader(share, vae))
        return lockstep(share, num_batches(len(held_out), run), "validate", run, self._watchdog)
