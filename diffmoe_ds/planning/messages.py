"""The collectives of one optimizer step: who takes part, how often, and how many bytes.

Bytes are what a rank passes to the collective; of an all-gather, what it gets. `planning.counting.Counter` counts them
in the same way. What crosses a link depends on the algorithm; `planning/cost.py` assumes one. Collectives over a single
rank are listed as well, because DeepSpeed calls them.

Sizes that routing decides (which rank holds how many of an expert's tokens) are averages. All others are exact.

Legend: W ranks, P ranks of an EP group, E experts, L MoE layers, D width, R routed rows of a rank's micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffmoe_ds.planning.layout import Layout

HISTOGRAM_BINS = 2048
"""Bins of an expert's histogram in the search for the K-th key of a pool (`moe/top_k.py`)."""
ALLREDUCE_ELEMENTS = 500_000_000
"""Gradient elements that DeepSpeed reduces at once at ZeRO 0."""


@dataclass(frozen=True)
class Message:
    """All calls of one collective for one purpose, in one optimizer step of one rank."""

    purpose: str
    """What is sent."""
    collective: str
    """``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``all_to_all``."""
    scope: str
    """The ranks that take part: ``world``, ``ep`` (the ranks that share a set of experts) or ``edp`` (the replicas of
    an expert)."""
    ranks: int
    """Their number."""
    calls: int
    """Calls per step."""
    bytes: int
    """Bytes per step, summed over the calls."""


def step_messages(layout: Layout) -> list[Message]:
    """Return the collectives of an optimizer step, without those of checkpoints, grids and stragglers.

    Args:
        layout: the model and its ranks.
    """
    found = [*_loop(layout), *_selection(layout), *_rows(layout)]
    stage = layout.settings.zero_stage
    if stage == 3:
        found += _stage_3(layout)
    elif stage:
        found += _stage_1_and_2(layout)
    else:
        found += _stage_0(layout)
    return [message for message in found if message.calls]


def candidates_of_rank(ranks: int) -> int:
    """Return M, the keys of one expert that each rank of a pool sends in the second message of a search."""
    return max(8, 256 // ranks)


def _search(layout: Layout, purpose: str, experts: int, times: int) -> Message:
    """Return the two all-reduces of a search in the pool: an int32 histogram, and a table of every rank's best keys."""
    ranks = layout.pool_ranks
    size = 4 * experts * HISTOGRAM_BINS + 4 * ranks * experts * (2 + candidates_of_rank(ranks))
    scope = "world" if layout.config.routing.pool == "world" else "ep"
    return Message(purpose, "all_reduce", scope, ranks, 2 * times, size * times)


def _selection(layout: Layout) -> list[Message]:
    """Return the messages by which ranks agree which tokens each expert takes, and on the thresholds."""
    config, steps = layout.config, layout.settings.accumulation
    layers, experts = layout.moe_layers, config.num_experts
    if not layers:
        return []
    found = []
    if layout.pool_ranks > 1:
        found.append(_search(layout, "selection", experts, layers * steps))
        if config.has_capacity_predictor:
            found.append(_search(layout, "thresholds", layers * experts, 1))
    return found


def _rows(layout: Layout) -> list[Message]:
    """Return the exchange of tokens with the ranks that hold their experts: out and back, forward and backward."""
    config, ranks = layout.config, layout.settings.ep_size
    calls = layout.moe_layers * layout.settings.accumulation
    if ranks == 1 or not calls:
        return []
    found = []
    row_bytes = config.size.hidden_size * layout.weight_bytes
    found.append(Message("rows", "all_to_all", "ep", ranks, 4 * calls, 4 * calls * routed_rows(layout) * row_bytes))
    if config.routing.kind == "token_choice":
        found.append(Message("row counts", "all_to_all", "ep", ranks, calls, calls * 8 * config.num_experts))
    return found


def routed_rows(layout: Layout) -> int:
    """Return R, the rows that a rank's micro-batch sends to experts; an average where the pool spans ranks."""
    return round(layout.config.routing.capacity * layout.tokens)


def _loop(layout: Layout) -> list[Message]:
    """Return what the training loop itself sends: the vote before every micro-batch, and the mean of the losses."""
    world, steps = layout.world, layout.settings.accumulation
    return [
        Message("vote", "all_reduce", "world", world, steps, 12 * steps),
        Message("losses", "all_reduce", "world", world, 1, 16),
    ]


def _stage_0(layout: Layout) -> list[Message]:
    found = _reduced_gradients(layout, ALLREDUCE_ELEMENTS)
    if layout.moe_layers:
        ep_size = layout.settings.ep_size
        found.append(Message("gradient norm", "all_reduce", "ep", ep_size, 1, 8))
        if layout.settings.bf16:
            found.append(Message("overflow flag", "all_reduce", "ep", ep_size, 1, 1))
    return found


def _stage_1_and_2(layout: Layout) -> list[Message]:
    found = _reduced_gradients(layout, layout.zero("reduce_bucket_size", 5e8))
    if layout.settings.bf16:
        found.append(Message("overflow flag", "all_reduce", "world", layout.world, 1, 1))
    experts = sum(group.is_expert for group in layout.groups)
    found.append(Message("gradient norm", "all_reduce", "world", layout.world, len(layout.groups), 4 * len(layout.groups)))
    found.append(Message("gradient norm", "all_reduce", "edp", layout.topology.edp_size, experts, 4 * experts))
    for is_expert, scope in ((False, "world"), (True, "edp")):
        shared = [g for g in layout.groups if g.is_expert == is_expert and g.ranks > 1]
        size = sum(group.numel for group in shared) * layout.weight_bytes
        ranks = shared[0].ranks if shared else 1
        found.append(Message("updated weights", "all_gather", scope, ranks, len(shared), size))
    return found


def _reduced_gradients(layout: Layout, bucket: float) -> list[Message]:
    """Return the all-reduces of gradients; DeepSpeed uses them at ZeRO 1 and 2, too, and keeps a partition of each."""
    dtype_bytes = communication_bytes(layout)
    repeated = layout.settings.accumulation if layout.settings.zero_stage == 2 else 1
    found = []
    for is_expert, scope, ranks in ((False, "world", layout.world), (True, "edp", layout.topology.edp_size)):
        elements = layout.elements(is_expert)
        calls = math.ceil(elements / bucket) * repeated
        found.append(Message("gradients", "all_reduce", scope, ranks, calls, elements * dtype_bytes * repeated))
    return found


def communication_bytes(layout: Layout) -> int:
    """Return the bytes of one gradient element on the wire."""
    named = {"fp32": 4, "bf16": 2, "fp16": 2}
    dtype_bytes: int = named.get(layout.settings.json.get("communication_data_type", ""), layout.weight_bytes)
    return dtype_bytes


def _stage_3(layout: Layout) -> list[Message]:
    steps = layout.settings.accumulation
    dtype_bytes = communication_bytes(layout)
    found = []
    groups = ((False, "world", layout.world), (True, "edp", layout.topology.edp_size))
    for is_expert, scope, ranks in groups:
        mine = [p.numel for p in layout.parameters if p.is_expert == is_expert]
        padded = [math.ceil(numel / ranks) * ranks for numel in mine]
        if ranks > 1:
            calls = math.ceil(sum(padded) / layout.zero("reduce_bucket_size", 5e8)) * steps
            found.append(Message("gradients", "reduce_scatter", scope, ranks, calls, sum(padded) * dtype_bytes * steps))
            threshold = layout.zero("stage3_param_persistence_threshold", 1e5)
            persistent = [n for n, raw in zip(padded, mine, strict=True) if raw <= threshold]
            gathered = [n for n, raw in zip(padded, mine, strict=True) if raw > threshold]
            w = layout.weight_bytes
            found.append(Message("small weights", "all_gather", scope, ranks, len(persistent), sum(persistent) * w))
            times = (2 if layout.config.model.activation_checkpointing else 1) * steps
            found.append(
                Message("weights", "all_gather", scope, ranks, len(gathered) * times, sum(gathered) * w * times)
            )
    norms = 1 + bool(layout.moe_layers)
    found.append(Message("gradient norm", "all_reduce", "world", layout.world, norms, 8 * norms))
    return found
