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

from diffmoe_ds.config.schema import Config
from diffmoe_ds.moe.auxiliary import counts_images
from diffmoe_ds.moe.padding import slots_of_expert
from diffmoe_ds.moe.search import BINS, candidates_of_rank
from diffmoe_ds.planning.layout import Layout

AGREED_VALUES = 16
"""Numbers of a rank in the loop's agreement: an error, four flags, ten losses, the verdict on the last search. Padded
dispatch adds one."""
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
    """The ranks that take part: ``world``, ``ep`` (the ranks that share a set of experts), ``edp`` (the replicas of
    an expert) or ``pool`` (the ranks of one pool of `routing.pool_images`)."""
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


def messages_of_passes(layout: Layout) -> list[Message]:
    """Return those of `step_messages` that forward and backward passes send, which are the ones a simulation counts.

    Args:
        layout: the model and its ranks.
    """
    purposes = ("selection", "rows", "row counts", "router losses")
    return [message for message in step_messages(layout) if message.purpose in purposes]


def _selection(layout: Layout) -> list[Message]:
    """Return the messages by which ranks agree on each expert's tokens, on thresholds, and on the router's losses."""
    config, steps = layout.config, layout.settings.accumulation
    layers, experts = layout.moe_layers, config.num_experts
    if not layers or layout.pool_ranks == 1:
        return []
    scope = "world" if config.routing.pool == "world" else "ep"
    ranks, found = layout.pool_ranks, []
    competing = layout.selection_ranks
    if config.has_pool and competing > 1:
        searched = experts if config.routing.kind == "batch_pool" else 1  # one K-th score, or one of each expert
        size = (_histogram_bytes(searched) + _table_bytes(competing, searched)) * layers * steps
        part = scope if competing == ranks else "pool"
        found.append(Message("selection", "all_reduce", part, competing, 2 * layers * steps, size))
    if config.has_capacity_predictor:  # one search for the experts of all layers and micro-steps
        columns, calls = layers * experts * steps, 1 if _has_attached_table(layout) else 2
        size = _histogram_bytes(columns) + (calls - 1) * _table_bytes(ranks, columns)
        found.append(Message("thresholds", "all_reduce", scope, ranks, calls, size))
    sizes = _loss_values(config)
    if sizes:
        calls = layers * steps
        found.append(Message("router losses", "all_reduce", scope, ranks, len(sizes) * calls, 4 * sum(sizes) * calls))
    return found


def _loss_values(config: Config) -> list[int]:
    """Return the numbers in each message by which a layer's router losses are computed over the pool."""
    names, experts = config.auxiliary_losses, config.num_experts
    is_per_image = config.routing.kind == "expert_choice"
    sizes = []
    if config.has_unconditional_expert and counts_images(config):
        sizes.append(1)  # the images whose tokens are routed
    if "balance" in names:
        sizes.append(experts)
    if "contrastive" in names and not is_per_image:
        width = config.size.hidden_size * (2 if config.routing.router_input == "time" else 1)
        sizes += [experts * width, experts]
    if "similarity" in names:
        sizes.append(experts**2)
    return sizes


# A search for the K-th keys of some experts sends a histogram, then a table with the best keys of every rank. This is
# the usual case. The first step, and a step in which many tokens lie near the K-th, send a few more messages.
def _histogram_bytes(experts: int) -> int:
    return 4 * experts * BINS


def _table_bytes(ranks: int, experts: int) -> int:
    return 4 * ranks * experts * (2 + candidates_of_rank(ranks))


def _has_attached_table(layout: Layout) -> bool:
    """Return whether the table of the thresholds' search travels with the agreement of a step's last micro-step."""
    return layout.config.has_capacity_predictor and layout.moe_layers > 0 and 1 < layout.pool_ranks == layout.world


def _rows(layout: Layout) -> list[Message]:
    """Return the exchange of tokens with the ranks that hold their experts: out and back, forward and backward."""
    config, ranks = layout.config, layout.settings.ep_size
    calls = layout.moe_layers * layout.settings.accumulation
    if ranks == 1 or not calls:
        return []
    found = []
    row_bytes = config.size.hidden_size * layout.weight_bytes
    found.append(Message("rows", "all_to_all", "ep", ranks, 4 * calls, 4 * calls * routed_rows(layout) * row_bytes))
    competing, kind = layout.selection_ranks, config.routing.kind
    is_unknown = _is_ragged(config) or (kind == "batch_pool" and competing > 1 and competing % ranks > 0)
    if is_unknown and _padding(layout) is None:  # otherwise the counts of the whole EP group follow from the selection
        found.append(Message("row counts", "all_to_all", "ep", ranks, calls, calls * 8 * config.num_experts))
    return found


def routed_rows(layout: Layout) -> int:
    """Return R, the rows that a rank's micro-batch sends to experts, padding included.

    An average where the pool spans ranks and rows are not padded.
    """
    capacity, experts, padding = layout.config.routing.capacity, layout.config.num_experts, _padding(layout)
    if padding is None:
        return round(capacity * layout.tokens * (1 - layout.config.null_fraction))
    return experts * slots_of_expert(layout.tokens, experts, capacity * padding)


def _is_ragged(config: Config) -> bool:
    """Return whether the rule leaves open how many rows an expert has, even over all ranks."""
    return config.routing.kind in ("token_choice", "expert_race") or config.routing.unconditional_expert


def _padding(layout: Layout) -> float | None:
    """Return `routing.padded_dispatch`; None if the layers have no use for it."""
    routing = layout.config.routing
    is_fixed = not _is_ragged(layout.config) and (routing.kind != "batch_pool" or layout.selection_ranks == 1)
    return routing.padded_dispatch if layout.moe_layers and not is_fixed else None


def _loop(layout: Layout) -> list[Message]:
    """Return what the training loop sends: errors, flags and losses of every rank, once per micro-step."""
    world, steps = layout.world, layout.settings.accumulation
    size = 4 * (AGREED_VALUES + (_padding(layout) is not None)) * world * steps
    if _has_attached_table(layout):
        size += _table_bytes(layout.pool_ranks, layout.moe_layers * layout.config.num_experts * steps)
    found = [Message("agreement", "all_reduce", "world", world, steps, size)]
    if layout.config.routing.bias_rate and layout.moe_layers and world > 1:
        loads = 4 * layout.moe_layers * layout.config.num_experts
        found.append(Message("expert loads", "all_reduce", "world", world, 1, loads))
    return found


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
    found.append(
        Message("gradient norm", "all_reduce", "world", layout.world, len(layout.groups), 4 * len(layout.groups))
    )
    found.append(Message("gradient norm", "all_reduce", "edp", layout.topology.edp_size, experts, 4 * experts))
    for is_expert, scope in ((False, "world"), (True, "edp")):
        shared = [g for g in layout.groups if g.is_expert == is_expert and g.ranks > 1]
        size = sum(group.numel for group in shared) * layout.weight_bytes
        ranks = shared[0].ranks if shared else 1
        found.append(Message("updated weights", "all_gather", scope, ranks, len(shared), size))
    return found


def _reduced_gradients(layout: Layout, bucket: float) -> list[Message]:
    """Return the all-reduces of gradients; DeepSpeed uses them at ZeRO 1 and 2, too, and keeps a partition of each."""
    dtype_bytes, edp = communication_bytes(layout), layout.topology.edp_size
    repeated = layout.settings.accumulation if layout.settings.zero_stage == 2 else 1
    calls = _bucket_fills(layout, bucket)
    return [
        Message(
            "gradients", "all_reduce", "edp" if is_expert else "world", edp if is_expert else layout.world,
            calls[is_expert] * repeated, layout.elements(is_expert) * dtype_bytes * repeated,
        )
        for is_expert in (False, True)
    ]  # fmt: skip


def _bucket_fills(layout: Layout, bucket: float) -> dict[bool, int]:
    """Return how many buckets contain dense gradients, and how many contain those of experts.

    A bucket is reduced before it overflows, with one all-reduce for each kind. At ZeRO 2 gradients arrive in the order
    of the backward pass, for which the reverse order of the parameters stands in.
    """
    order = [p for group in layout.groups for p in group.parameters]
    if layout.settings.zero_stage == 2:
        order = list(reversed(layout.parameters))
    calls, filled, kinds = {False: 0, True: 0}, 0, set[bool]()
    for parameter in order:
        if filled + parameter.numel > bucket:
            filled, kinds = 0, set()
        if parameter.is_expert not in kinds:
            kinds.add(parameter.is_expert)
            calls[parameter.is_expert] += 1
        filled += parameter.numel
    return calls


def communication_bytes(layout: Layout) -> int:
    """Return the bytes of one gradient element on the wire."""
    named = {"fp32": 4, "bf16": 2, "fp16": 2}
    dtype_bytes: int = named.get(layout.settings.json.get("communication_data_type", ""), layout.weight_bytes)
    return dtype_bytes


def _stage_3(layout: Layout) -> list[Message]:
    """Return the messages of ZeRO 3, which pads every parameter to a multiple of its ranks.

    Small weights are gathered after the update, one by one; the others once per micro-step, several at a time, and kept
    for the backward pass (``stage3_max_reuse_distance``, 10^9 elements by default, exceeds the models of the presets
    but for the largest with all experts on one rank). The number of calls of the latter is an estimate.
    """
    steps, width, found = layout.settings.accumulation, layout.weight_bytes, []
    edp, ep_size = layout.topology.edp_size, layout.settings.ep_size
    threshold = layout.zero("stage3_param_persistence_threshold", 1e5)
    at_once = min(layout.zero("stage3_prefetch_bucket_size", 5e7), layout.zero("reduce_bucket_size", 5e8))
    for is_expert, scope, ranks in ((False, "world", layout.world), (True, "edp", edp)):
        mine = [(p.numel, math.ceil(p.numel / ranks) * ranks) for p in layout.parameters if p.is_expert == is_expert]
        reduced = sum(padded for _, padded in mine) * communication_bytes(layout) * steps
        calls = math.ceil(reduced / at_once)
        found.append(Message("gradients", "reduce_scatter", scope, ranks, calls, reduced))
        if ranks > 1:
            small = [padded for numel, padded in mine if numel <= threshold]
            found.append(Message("small weights", "all_gather", scope, ranks, len(small), sum(small) * width))
            large = sum(padded for numel, padded in mine if numel > threshold)
            calls = math.ceil(large / at_once) * steps
            found.append(Message("weights", "all_gather", scope, ranks, calls, large * width * steps))
    found.append(Message("gradient norm", "all_reduce", "world", layout.world, 1, 8))
    if layout.moe_layers:
        found.append(Message("gradient norm", "all_reduce", "edp", edp, 1, 8))
        if ep_size > 1:
            found.append(Message("gradient norm", "all_reduce", "ep", ep_size, 1, 8))
    return found
