"""What a resume reads, exchanges and holds, in the layout that saved the checkpoint.

Every rank verifies and reads the file that it wrote: the headers become an index that all ranks share, and the weights
reach the ranks that need them in collectives (`checkpoint/restore.py`). The figures are upper bounds, for the rank for
which they are largest; pages that are still cached after the verification are not read from the disk again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from diffmoe_ds.checkpoint.pieces import FLOAT, ROW_BYTES
from diffmoe_ds.checkpoint.restore import CHUNK_NUMEL
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.planning.layout import Group, Layout

OPENS = 11
"""Opens by rank 0: ``checkpoints/`` and ``latest`` twice each (before and after the ranks join), ``manifest.json``
twice, ``meta.json`` three times, and its file of tensors twice, to verify it and to read it. Other ranks open less."""
HEADER_ENTRY = 192
"""Bytes of a tensor in a header."""
MANIFEST_ENTRY = 192
"""Bytes of a file in ``manifest.json``."""
METADATA_ENTRY = 192
"""Bytes of a parameter in ``meta.json``."""
VOTES = 1024
"""Bytes of the votes on errors."""
PROCESS = 32 << 20
"""Bytes of modules that are imported, of metadata and manifest as Python objects, and of the allocator's reserve."""
METADATA_REST = 1 << 16
"""Bytes of everything else in ``meta.json``."""


@dataclass(frozen=True)
class ResumeCost:
    """What a resume costs the rank for which it costs most."""

    opens: int
    """Files and directories opened."""
    read: int
    """Bytes read."""
    exchanged: int
    """Bytes that the rank passes to collectives; of an all-gather, those that it gets."""
    host_memory: int
    """Bytes of host memory, besides the weights and the state that are restored."""


def resume_cost(layout: Layout) -> ResumeCost:
    """Return what resuming a run costs, if neither the ranks nor the expert placement have changed.

    Args:
        layout: the model and its ranks.
    """
    kinds = 2 + len(MOMENTS[layout.settings.json["optimizer"]["type"]])  # master weights, averaged weights, moments
    rows, elements = _saved(layout)
    held = layout.elements(False) + layout.elements(True)
    metadata = METADATA_ENTRY * len(layout.parameters) + METADATA_REST
    header = HEADER_ENTRY * (rows * kinds + layout.moe_layers)  # with the thresholds
    state = kinds * FLOAT * elements
    thresholds = FLOAT * layout.moe_layers * layout.config.num_experts
    index = ROW_BYTES * rows * layout.world
    shared = (1 if layout.settings.zero_stage else 1 + kinds) * FLOAT * held
    return ResumeCost(
        opens=OPENS,
        read=(
            2 * MANIFEST_ENTRY * (layout.world + 1) + 3 * metadata  # compared and verified, and read once more
            + 2 * (header + state + thresholds) + FLOAT * elements  # the weights are among the state, too
        ),
        exchanged=index + shared + thresholds + VOTES if layout.world > 1 else 0,
        host_memory=3 * index + FLOAT * CHUNK_NUMEL + PROCESS,  # the index is gathered, merged and sorted
    )  # fmt: skip


def _saved(layout: Layout) -> tuple[int, int]:
    """Return the most fragments, and the most elements of parameters, that a rank saves."""
    parameters, stage = layout.parameters, layout.settings.zero_stage
    if stage == 0:  # rank 0 saves all that it holds
        return len(parameters), sum(p.numel for p in parameters)
    if stage == 3:
        ranks = {True: layout.topology.edp_size, False: layout.world}
        return len(parameters), sum(-(-p.numel // ranks[p.is_expert]) for p in parameters)
    return sum(map(_most_fragments, layout.groups)), sum(group.partition for group in layout.groups)


def _most_fragments(group: Group) -> int:
    """Return the most parameters of which one rank updates a part."""
    bounds = [0]
    for parameter in group.parameters:
        bounds.append(bounds[-1] + parameter.numel)
    counts = [0] * group.ranks
    for first, last in pairwise(bounds):
        for rank in range(first // group.partition, -(-last // group.partition)):
            counts[rank] += 1
    return max(counts)
