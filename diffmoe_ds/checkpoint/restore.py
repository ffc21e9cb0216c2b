"""Fill a model and an engine from a checkpoint.

Ranks that need the same weights read each byte of them once: a rank reads some of the files, and what it has read
reaches the others in an all-reduce, to which they contribute zeros. It adds the bits as integers, so that all survive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.architecture import has_null
from diffmoe_ds.checkpoint.layout import BUFFER
from diffmoe_ds.checkpoint.load import CLASS_EMBEDDING, PROJECTOR, CheckpointReader, WeightsReader
from diffmoe_ds.checkpoint.pieces import COLUMNS, NUMBER
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.collectives import Group, all_gather, all_reduce, broadcast, get_rank, get_world_size
from diffmoe_ds.distributed.consensus import raise_on_all_ranks, vote
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT, saved_buffers
from diffmoe_ds.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from diffmoe_ds.distributed.fragments import Fragment, Part

CHUNK_NUMEL = 8 << 20
"""Elements that are read, and exchanged between ranks, at a time."""


class Target(NamedTuple):
    """A tensor of this rank that a checkpoint fills."""

    kind: str
    """What of the parameter: one of `layout.KINDS`, or `layout.BUFFER`."""
    name: str
    """The parameter."""
    start: int
    """First element in the flattened logical tensor."""
    out: Tensor
    """The tensor to fill, flat."""


@torch.no_grad()
def fill(target: Target, reader: WeightsReader) -> None:
    """Fill a tensor with what a checkpoint or an exported model stores, at most `CHUNK_NUMEL` elements at a time.

    Raises:
        CheckpointError: the elements do not exist or cannot be read.
    """
    in_place = target.out.dtype == torch.float32 and target.out.device.type == "cpu"
    for first, part in chunks(target.out):
        wanted = target.kind, target.name, target.start + first, part.numel()
        if in_place:
            reader.read(*wanted, out=part)
        else:
            part.copy_(reader.read(*wanted))


def chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first element, view) of consecutive parts of a flat tensor, of at most `CHUNK_NUMEL` elements each."""
    for first in range(0, flat.numel(), CHUNK_NUMEL):
        yield first, flat[first : first + CHUNK_NUMEL]


def restore_weights(model: DiT, reader: WeightsReader, topology: Topology, kind: str) -> None:
    """Fill a model with weights, all read by this process; `restore_model` divides them between ranks.

    Args:
        model: holds the experts of this rank; its values need not be initialized, except for the class embedding.
        reader: the weights; if their class embedding has other rows, the model keeps its own. Its files are closed.
        topology: which experts this rank holds.
        kind: ``fp32`` or ``ema``.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    for target in [*weight_targets(model, reader, topology, kind), *buffer_targets(model)]:
        fill(target, reader)
    model.reset_positions()
    reader.close()


def weight_targets(model: DiT, reader: WeightsReader, topology: Topology, kind: str) -> list[Target]:
    """Return the parameters that weights fill; see `restore_weights`.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    there, here = reader.config, model.config
    other_classes = there.model.num_classes != here.model.num_classes or has_null(there) != has_null(here)
    other_projector = _projector(there) != _projector(here)
    targets = []
    for name, parameter in model.named_parameters():
        if other_classes and name == CLASS_EMBEDDING:
            continue
        if other_projector and name.startswith(PROJECTOR):
            continue
        logical = reader.shape(name)
        first = topology.ep_rank * parameter.numel() if is_expert(name) else 0
        shape = (topology.num_experts, *parameter.shape[1:]) if is_expert(name) else tuple(parameter.shape)
        if shape != logical:
            raise CheckpointError(f"{reader.path}: {name!r} has shape {logical}, but the model's is {shape}.")
        targets.append(Target(kind, name, first, parameter.data.view(-1)))
    return targets


def _projector(config: Config) -> tuple[object, ...]:
    """Return what the shape of REPA's projector depends on."""
    return config.aligned_block is None, config.loss.repa_hidden, config.loss.repa_features


def buffer_targets(model: DiT) -> list[Target]:
    """Return the buffers that are stored with a model's weights: the thresholds, but not the computed positions."""
    return [Target(BUFFER, name, 0, buffer.data.view(-1)) for name, buffer in saved_buffers(model).items()]


def is_expert(name: str) -> bool:
    """Return whether a parameter holds the weights of experts, of which a rank computes with some."""
    return ".experts." in name


def share_index(reader: WeightsReader, device: torch.device) -> None:
    """Index a checkpoint of which each rank reads the headers of some files. Every rank must call this.

    Args:
        reader: the checkpoint; an exported model is a single file and needs no index.
        device: device for the tensors of the collectives.

    Raises:
        CheckpointError: on all ranks, if any file is missing or damaged.
    """
    if not isinstance(reader, CheckpointReader):
        return
    files = range(get_rank(), reader.metadata.files, get_world_size())
    mine = torch.from_numpy(raise_on_all_ranks(device, lambda: reader.scan(files))).to(device)
    longest = int(all_reduce(torch.tensor(len(mine), device=device), "max"))
    padded = mine.new_full((max(longest, 1), COLUMNS), -1)
    padded[: len(mine)] = mine
    reader.set_index(torch.cat([rows[rows[:, NUMBER] >= 0] for rows in all_gather(padded)]).cpu().numpy())


@torch.no_grad()
def restore_model(model: DiT, reader: WeightsReader, topology: Topology, kind: str, device: torch.device) -> None:
    """Fill a model with weights as `restore_weights` does, but read each byte once. Every rank must call this.

    All ranks share the dense weights, and the replicas of an expert its weights.

    Args:
        model: see `restore_weights`.
        reader: the weights, after `share_index`.
        topology: the ranks and the expert placement.
        kind: ``fp32`` or ``ema``.
        device: device for the tensors of the collectives.

    Raises:
        CheckpointError: on all ranks, if a tensor is missing or has another shape, or a rank cannot read its part.
    """
    from diffmoe_ds.distributed.deepspeed_seam import expert_parallel_group

    targets = raise_on_all_ranks(device, lambda: _stored(weight_targets(model, reader, topology, kind), reader))
    dense = [target for target in targets if not is_expert(target.name)]
    experts = [target for target in targets if is_expert(target.name)]
    replicas = expert_parallel_group(topology.ep_size, replicas=True)
    failures = [_exchange(dense, reader, None, device), _exchange(experts, reader, replicas, device)]
    failures.append(_broadcast(buffer_targets(model), reader, device))
    vote(device, next(filter(None, failures), None))
    model.reset_positions()


@torch.no_grad()
def restore_engine(
    engine: DeepSpeedEngine,
    reader: CheckpointReader,
    fragments: Sequence[Fragment],
    ema: Sequence[Tensor],
    parts: Mapping[str, Part],
) -> None:
    """Restore this rank's master weights, moments and averaged weights, and the counters. Every rank must call this.

    Args:
        engine: built from a model that `restore_model` filled.
        reader: the checkpoint, after `share_index`.
        fragments: the fragments of this rank.
        ema: the averaged weights of each fragment.
        parts: the part of every parameter that this rank computes with, by name.

    Raises:
        CheckpointError: on all ranks, if the checkpoint lacks a part of a fragment, or a rank cannot read its part.
    """
    from diffmoe_ds.distributed.deepspeed_seam import set_adam_step

    targets = [
        Target(kind, fragment.name, fragment.start, out)
        for fragment, averaged in zip(fragments, ema, strict=True)
        for kind, out in {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}.items()
    ]
    device = engine.device
    raise_on_all_ranks(device, lambda: _stored(targets, reader))
    if engine.zero_optimization_stage():  # the fragments of no two ranks overlap
        raise_on_all_ranks(device, lambda: [fill(target, reader) for target in targets])
    else:
        failures = []
        for expert in (False, True):
            alike = [target for target in targets if is_expert(target.name) is expert]
            failures.append(_exchange(alike, reader, parts[alike[0].name].group, device) if alike else None)
        vote(device, next(filter(None, failures), None))
    saved = reader.metadata
    set_adam_step(engine, saved.adam_step)
    engine.global_steps = saved.step
    engine.global_samples = saved.images
    if engine.lr_scheduler is None:  # or no longer: the learning rate is that of the optimizer's settings
        return
    if saved.step:  # computed, not restored: the schedule may have been added or changed since
        engine.lr_scheduler.step((saved.lr_scheduler or {}).get("last_batch_iteration", saved.step - 1))


def _stored(targets: list[Target], reader: WeightsReader) -> list[Target]:
    """Return the targets after a check that all of their elements are stored.

    Raises:
        CheckpointError: some are not.
    """
    for target in targets:
        reader.runs(target.kind, target.name, target.start, target.out.numel())
    return targets


def _exchange(
    targets: Sequence[Target], reader: WeightsReader, group: Group | None, device: torch.device
) -> CheckpointError | None:
    """Fill tensors that all ranks of a group want alike; each file is read by one of them.

    Every rank of the group must call this. A rank that cannot read its part still takes part in all collectives.

    Args:
        targets: the same ranges on every rank of the group; all of their elements are stored.
        reader: the source.
        group: the ranks; the world if None.
        device: device for the tensors of the collectives.

    Returns:
        The error of this rank, for a vote: the tensors of all ranks are invalid then.
    """
    files = {run.file for t in targets for run in reader.runs(t.kind, t.name, t.start, t.out.numel())}
    rank, size = get_rank(group), get_world_size(group)
    mine = set(sorted(files)[rank::size])
    failure = None
    largest = max((part.numel() for target in targets for _, part in chunks(target.out)), default=0)
    host = torch.empty(largest)
    for target in targets:
        for first, part in chunks(target.out):
            found = host[: part.numel()].zero_()
            start = target.start + first
            try:
                for run in reader.runs(target.kind, target.name, start, part.numel()) if failure is None else ():
                    if run.file in mine:
                        reader.read_run(target.name, run, found[run.start - start : run.start - start + run.numel])
            except CheckpointError as error:
                failure = error
            found = found.to(device)
            if size > 1:
                all_reduce(found.view(torch.int32), group=group)
            part.copy_(found)
    return failure


def _broadcast(targets: Sequence[Target], reader: WeightsReader, device: torch.device) -> CheckpointError | None:
    """Fill tensors on all ranks with what rank 0 reads; see `_exchange`. The file of rank 0 holds the buffers."""
    failure = None
    for target in targets:
        found = torch.zeros(target.out.numel())
        try:
            if get_rank() == 0:
                found = reader.read(target.kind, target.name, target.start, target.out.numel())
        except CheckpointError as error:
            failure = error
        target.out.copy_(broadcast(found.to(device)))
    return failure
