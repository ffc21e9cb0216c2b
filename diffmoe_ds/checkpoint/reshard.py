"""Rewrite a checkpoint for another layout.

Resuming does not need this, because every layout reads every checkpoint.  It speeds up reading: each rank of the new
layout finds its part in one file instead of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_ds.checkpoint.export import PIECE_NUMEL
from diffmoe_ds.checkpoint.layout import BUFFER, META, fragment_key, rank_file
from diffmoe_ds.checkpoint.load import CheckpointReader, check_complete
from diffmoe_ds.checkpoint.metadata import write_manifest
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Digest, write_json
from diffmoe_ds.outputs import new_directory
from diffmoe_ds.topology import Topology


def reshard(reader: CheckpointReader, out: Path, world: int, ep_size: int) -> None:
    """Write a checkpoint as ``world`` ranks would, holding one piece of one tensor at a time.

    Args:
        reader: the checkpoint.
        out: directory of the new checkpoint; must not exist.
        world: number of ranks.
        ep_size: ranks that share one set of experts.

    Raises:
        TopologyError: the EP size does not divide the experts or the ranks.
        CheckpointError: the checkpoint is incomplete, or ``out`` exists or cannot be written; nothing of it is left.
    """
    ranks = [Topology(rank, world, ep_size, reader.config.num_experts) for rank in range(world)]
    if out.exists():
        raise CheckpointError(f"--out {out}: already exists; a checkpoint is never overwritten.")
    check_complete(reader)
    with new_directory(out) as tmp:
        files = {}
        for topology in tqdm(ranks, unit="file", desc="reshard"):
            files[rank_file(topology.rank)] = _write(reader, topology, tmp / rank_file(topology.rank))
        # The new ranks need not share a batch in the same way, so micro-batch and accumulation are no longer known.
        layout = replace(reader.metadata.layout, world=world, ep_size=ep_size, micro_batch=None, accumulation=None)
        metadata = replace(reader.metadata, files=world, layout=layout)
        files[META] = write_json(tmp / META, metadata.to_json())
        write_manifest(tmp, files)


def _write(reader: CheckpointReader, topology: Topology, path: Path) -> Digest:
    """Write one rank's file: its part of every tensor when everything is partitioned (ZeRO 3)."""
    entries = []
    kinds = ("fp32", *MOMENTS[reader.metadata.optimizer], "ema")
    for name in reader.metadata.shapes:
        start, numel = _part(reader.shape(name), ".experts." in name, topology)
        for kind in kinds if numel else ():
            pieces = _read_lazily(reader, kind, name, start, numel)
            entries.append(Entry(fragment_key(kind, name, start), (numel,), torch.float32, pieces))
    if topology.rank == 0:
        for name, numel in reader.buffers().items():
            pieces = _read_lazily(reader, BUFFER, name, 0, numel)
            entries.append(Entry(fragment_key(BUFFER, name, 0), (numel,), torch.float32, pieces))
    return write_safetensors(path, entries, {})


def _read_lazily(reader: CheckpointReader, kind: str, name: str, start: int, numel: int) -> Iterator[Tensor]:
    for first in range(start, start + numel, PIECE_NUMEL):
        yield reader.read(kind, name, first, min(PIECE_NUMEL, start + numel - first))


def _part(shape: tuple[int, ...], is_expert: bool, topology: Topology) -> tuple[int, int]:
    """Return first element and number of elements of a rank's part of a flattened logical tensor."""
    numel = torch.Size(shape).numel()
    if not is_expert:
        first, numel, index, count = 0, numel, topology.rank, topology.world
    else:
        numel //= topology.ep_size
        first, index, count = topology.ep_rank * numel, topology.rank // topology.ep_size, topology.edp_size
    share = -(-numel // count)
    start = min(index * share, numel)
    return first + start, min(share, numel - start)
