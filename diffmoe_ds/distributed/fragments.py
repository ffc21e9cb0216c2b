"""Parameter sharding: the part a rank computes with, and the fragments of the master weights it updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The part of a parameter that this rank computes with: all of it, or the experts held here."""

    logical_shape: tuple[int, ...]
    """Shape of the whole tensor; for expert weights with all E experts."""
    first: int
    """First element of the part in the flattened logical tensor."""
    numel: int
    """Elements of the part."""
    group: dist.ProcessGroup
    """The ranks that compute with the same part; together they keep its master weights."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of a part that this rank keeps in fp32 and updates."""

    name: str
    """The parameter's name in the model."""
    offset: int
    """First element of the piece in the flattened part."""
    start: int
    """First element of the piece in the flattened logical tensor."""
    fp32: Tensor
    """The master weights of the piece: a flat view into what the optimizer updates."""
    moments: dict[str, Tensor]
    """The optimizer's moments of the piece by name, such as ``exp_avg``: flat views that exist from the start."""
    is_owner: bool
    """False where another rank keeps the same piece (ZeRO 0) and writes it to checkpoints."""
