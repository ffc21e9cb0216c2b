"""The option ``--capacity``: calibrate on all ranks or reuse saved thresholds, and report the measured capacity.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.distributed.collectives import all_reduce, broadcast
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.capacity import (
    ALONE,
    Calibration,
    Ranks,
    apply,
    calibrate,
    calibration_batch,
    uses_thresholds,
)
from diffmoe_ds.sampling.capacity_file import CapacityFile
from diffmoe_ds.sampling.generate import SamplingSettings
from diffmoe_ds.sampling.observer import CapacityMeter, capacities

WARN_FROM = 0.02
"""Deviation of the calibration images' capacity, as a fraction of c, above which `set_capacity` prints a note."""


@dataclass(frozen=True)
class Dial:
    """Inputs of a calibration other than the models."""

    capacity: float
    """c, valid for the model."""
    reader: WeightsReader
    """The model's weights; thresholds are saved next to them."""
    depends_on: Callable[[], Mapping[str, Any]]
    """Called on rank 0; returns what determines the model's output for an image, by name, as plain data."""
    settings: SamplingSettings
    """Sampler and guidance."""
    batch_size: int
    """Images per batch in sampling."""


def set_capacity(model: DiT, guide: DiT | None, dial: Dial, rendezvous: Rendezvous) -> None:
    """Set a model's capacity, with thresholds saved next to the checkpoint or a calibration on all ranks.

    Args:
        model: in eval mode, with its inference rule set; its thresholds in memory are replaced.
        guide: the guiding model of autoguidance.
        dial: the capacity and the other inputs.
        rendezvous: the ranks, which must all call this; the process group exists if there are several.

    Raises:
        CheckpointError: on all ranks, if rank 0 cannot read the checkpoint.
    """
    if not uses_thresholds(model):
        apply(model, calibrate(model, dial.settings, dial.capacity))
        return
    launch, shape = rendezvous.launch, (len(model.moe_layers()), model.config.num_experts)
    file = rendezvous.on_main("capacity", lambda: _file(dial, calibration_batch(model, dial.batch_size)))
    found = _from_main(None if file is None else file.read(*shape), shape, dial.capacity, launch)
    if found is None:
        found = _calibrate(model, guide, dial, launch)
        if file is not None:
            print(f"{'calibration':>11}  {_keep(file, found)}", flush=True)
    elif file is not None:
        print(f"{'calibration':>11}  thresholds for {dial.capacity:g} from {file.path}", flush=True)
    apply(model, found)
    if launch.rank == 0 and abs(found.measured - found.capacity) > WARN_FROM * found.capacity:
        print(f"{'note':>11}  the calibration reached {found.measured:.4g} instead of {found.capacity:g}", flush=True)


def used_capacity(meter: CapacityMeter, world: int) -> Tensor | None:
    """Return the experts per token over the images of all ranks, fp64 [L]; None without experts or images.

    Every rank must call this.

    Args:
        meter: has observed this rank's images.
        world: number of ranks.
    """
    counts = meter.counts.cpu()
    if world > 1:
        all_reduce(counts)
    return capacities(counts) if counts.any() else None


def print_capacity(counts: Tensor, counted: int, num_images: int, asked: float | None) -> None:
    """Print the measured capacity of the generated images, unless the counts are zero, as those of a dense model.

    Args:
        counts: int64 [L, E + 1], over all images; see `CapacityMeter.counts`.
        counted: number of images that the counts cover.
        num_images: number of generated images.
        asked: the requested capacity, if any.
    """
    if not counts.any():
        return
    mean_L = capacities(counts)
    details = [] if asked is None else [f"requested {asked:g}"]
    if len(mean_L) > 1:
        details.append(f"per layer {float(mean_L.min()):.4g} to {float(mean_L.max()):.4g}")
    if counted < num_images:
        details.append(f"over {counted:,} of {num_images:,} images, the others were not counted by an earlier version")
    in_brackets = f" ({'; '.join(details)})" if details else ""
    print(f"{'capacity':>11}  {float(mean_L.mean()):.4g} experts per token{in_brackets}", flush=True)


def _calibrate(model: DiT, guide: DiT | None, dial: Dial, launch: Launch) -> Calibration:
    ranks = ALONE if launch.world == 1 else Ranks(launch.rank, launch.world, all_reduce)
    with tqdm(unit="step", desc="calibrate", disable=launch.rank != 0) as bar:

        def progress(number: int, done: int, total: int) -> None:
            if bar.total != total or done < bar.n:
                bar.reset(total)
                bar.set_description(f"calibrate {number}")
            bar.update(done - bar.n)

        return calibrate(model, dial.settings, dial.capacity, guide, dial.batch_size, ranks, progress)


def _file(dial: Dial, batch_size: int) -> CapacityFile:
    path, settings = dial.reader.path, {**dial.depends_on(), "calibration_batch": batch_size}
    return CapacityFile(path if path.is_dir() else path.parent, dial.capacity, settings)


def _keep(file: CapacityFile, calibration: Calibration) -> str:
    """Write the file if possible, and return a line about the calibration."""
    result = f"reached {calibration.measured:.4g} in {calibration.rounds} rounds"
    if calibration.rounds == 0:
        return "not needed: every expert takes every token"
    try:
        file.write(calibration)
    except CheckpointError as error:
        return f"{result}, but the thresholds cannot be saved: {error}"
    return f"{result}, thresholds saved to {file.path}"


def _from_main(
    found: Calibration | None, shape: tuple[int, int], capacity: float, launch: Launch
) -> Calibration | None:
    """Broadcast what rank 0 found, so that it is bit-identical on every rank."""
    if launch.world == 1:
        return found
    numbers = torch.zeros(3 + shape[0] * shape[1], dtype=torch.float64)
    if found is not None and found.threshold_LE is not None:
        head = torch.tensor([1, found.measured, found.rounds], dtype=torch.float64)
        numbers = torch.cat([head, found.threshold_LE.double().flatten()])
    is_found, measured, rounds, *thresholds = broadcast(numbers).tolist()
    if not is_found:
        return None
    return Calibration(capacity, torch.tensor(thresholds).view(shape), measured, int(rounds))
