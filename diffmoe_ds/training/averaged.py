"""The model with the averaged weights, for sample grids and evaluation during training."""

from __future__ import annotations

from diffmoe_ds.model.dit import DiT
from diffmoe_ds.training.setup import Run, build_model


def averaged_model(run: Run) -> DiT:
    """Return a new model with the current averaged weights, in eval mode with the default inference rule.

    Every rank must call this. The model has the dtype and the expert placement of the run. Keeping it would take memory
    for a second set of weights during training; building it takes milliseconds, because the weights are not
    initialized.
    """
    dtype = next(run.model.parameters()).dtype
    model = build_model(run.config, run.topology, run.device, dtype).eval()
    model.set_inference(run.config.inference_choices[0])
    run.ema.copy_to(model, run.model)
    return model
