"""The loss of ``diffmoe evaluate --validation``, with or without generated images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffmoe_ds.checkpoint.export import WEIGHTS, require_weights
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind
from diffmoe_ds.cli.sample_model import read_model
from diffmoe_ds.cli.sampling_plan import DTYPES, default_dtype
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed.collectives import all_reduce, init_process_group
from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.distributed.lost_ranks import naming_lost_ranks
from diffmoe_ds.distributed.rendezvous import Rendezvous, join_ranks
from diffmoe_ds.evaluation.evaluate import Team
from diffmoe_ds.evaluation.held_out import HeldOut, read_held_out
from diffmoe_ds.evaluation.table import finite_or_none, model_lines
from diffmoe_ds.evaluation.validation_loss import validation_loss
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.topology import Topology


def run_loss(args: argparse.Namespace) -> None:
    """Compute the loss on held-out images on all ranks, without generating images, and print it on rank 0.

    Args:
        args: of `cli.evaluate.add_evaluate_arguments`.

    Raises:
        DiffMoEError: on all ranks, if any rank fails.
    """
    rendezvous = join_ranks(resolve_launch())
    with naming_lost_ranks(rendezvous):
        found = _loss(args, rendezvous)
    if rendezvous.launch.rank == 0:
        as_json = args.json
        lines = [json.dumps(finite_or_none(found), allow_nan=False)] if as_json else model_lines(found)
        print("\n".join(lines))


def _loss(args: argparse.Namespace, rendezvous: Rendezvous) -> dict[str, Any]:
    launch = rendezvous.launch
    reader = rendezvous.raise_on_all_ranks("samples", lambda: require_weights(args.checkpoint, "--checkpoint"))
    held_out = rendezvous.raise_on_all_ranks("validation", lambda: open_held_out(reader, args.validation))
    device, topology = local_device(launch), Topology(launch.rank, launch.world, 1, reader.config.num_experts)
    kind = best_kind(reader) if args.weights is None else WEIGHTS[args.weights]
    routing = args.routing or reader.config.inference_choices[0]
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    model = rendezvous.raise_on_all_ranks("weights", lambda: read_model(reader, kind, routing, topology, device, dtype))
    if launch.world > 1:
        init_process_group("gloo", rendezvous.init_method())
    return loss_of(model, held_out, args.batch_size, Team(launch.rank, launch.world))


def open_held_out(reader: WeightsReader, path: str) -> HeldOut:
    """Return the images of ``--validation``: pixels or prepared latents, as the model takes them.

    Args:
        reader: the model.
        path: the value of the option.

    Raises:
        DiffMoEError: they cannot be read or do not fit the model.
    """
    data = reader.config.data.model_copy(update={"vae": None})
    return read_held_out(reader.config.model_copy(update={"data": data}), path, "--validation", reader.text)


def loss_of(model: DiT, held_out: HeldOut, batch_size: int, team: Team) -> dict[str, Any]:
    """Return a model's loss on held-out images, as named in the results of the command. Every rank must call this.

    Args:
        model: in eval mode, with all experts.
        held_out: the images.
        batch_size: images per batch; images that compete must share a batch, so each rank gets whole batches.
        team: the ranks.

    Raises:
        DataError: on all ranks, if any rank cannot read an image.
    """
    together = batch_size if model.images_compete else 1
    batches = held_out.read(team.share(len(held_out), together), batch_size)
    objective = make_objective(model.config.objective.kind)
    reduce = all_reduce if team.world > 1 else _unchanged
    set_tf32(True)
    loss = validation_loss(model, objective, _agreed(batches, team), len(held_out), reduce)
    set_tf32(False)
    return {
        "validation_loss": loss.mean,
        "validation_loss_by_noise_level": list(loss.by_noise_level),
        "validation_images": loss.images,
    }


def _agreed(batches: Iterator[MicroBatch], team: Team) -> Iterator[MicroBatch]:
    """Yield this rank's batches, which may be fewer than another's; if one cannot be read on any rank, all raise."""
    while True:
        batch = team.agree(lambda: next(batches, None))
        if not team.any(batch is not None):
            return
        if batch is not None:
            yield batch


def _unchanged(sums: Tensor) -> Tensor:
    return sums
