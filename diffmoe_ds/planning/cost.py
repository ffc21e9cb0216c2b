"""Expected time of an optimizer step: a model with few constants, for comparing layouts rather than for promises.

Assumptions, all of them constants of this file or of `planning/devices.py`:

- *Compute*: matrix products run at `EFFICIENCY` of the GPU's dense bf16 peak (fp32: half of it, with TF32).
  Activation checkpointing adds a forward pass. The host needs `OPERATOR_S` to launch an operator; the longer of the two
  counts.
- *Update*: bound by memory; weights, gradient, moments and EMA are read and written once at `BANDWIDTH_SHARE` of the
  GPU's memory bandwidth.
- *Collectives*: a call costs a latency that grows with the number of ranks, plus the bytes that a ring sends and
  receives, 2 (n - 1) / n of an all-reduce's message and (n - 1) / n of the others', at `BANDWIDTH_SHARE` of the
  bandwidth: NVLink's if all ranks are on one node, else that of the network ports of the group's GPUs on a node
  together, as NCCL builds one ring for each port. Of a row exchange over nodes only the rows that leave the node count,
  at one GPU's share of the network. Ranks fill one node after another.
- *Overlap*: gradients are reduced behind the backward pass at ZeRO 3 and with ``overlap_comm``, and ZeRO 3 gathers
  weights behind the passes; what takes longer than these is waited for. The selection and the exchange of rows are
  always waited for.

Latencies of small all-reduces are estimates, not measurements of this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffmoe_ds.planning.devices import Device
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.planning.messages import Message, step_messages

EFFICIENCY = 0.5
"""Share of the peak that matrix products of a transformer reach."""
BANDWIDTH_SHARE = 0.75
"""Share of a link's or memory's bandwidth that large transfers reach."""
OPERATOR_S = 6e-6
"""Host time per operator of eager PyTorch, the views between two operators included."""
LATENCY_S = ((1, 0.0), (2, 10e-6), (8, 18e-6), (64, 45e-6), (1024, 95e-6))
"""(ranks, seconds) of a small all-reduce; between them the logarithm of the ranks is interpolated."""
PEER_S = 1e-6
"""Additional latency of an all-to-all for each rank of the group."""
FP32_SHARE = 1 / 2
"""Peak of fp32 products, which use TF32 in training, relative to bf16, on all GPUs of `planning/devices.py`."""


@dataclass(frozen=True)
class StepTime:
    """Expected seconds of the parts of an optimizer step; overlapped communication is left out."""

    compute: float
    """Forward and backward pass, or launching their operators if that takes longer."""
    selection: float
    """Agreement on the tokens of each expert and on the thresholds."""
    rows: float
    """All-to-all dispatch and combine."""
    gradients: float
    """Reduction of gradients that is not hidden behind the backward pass."""
    weights: float
    """Gathering weights that is not hidden."""
    update: float
    """Optimizer and EMA."""
    other: float
    """Votes, losses, norms and flags, and the last keys of the thresholds' search, which travel with them."""

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name."""
        return dict(vars(self))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        """Name of the part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


_PART = {"selection": "selection", "thresholds": "selection", "rows": "rows", "row counts": "rows"}
_PART |= {"gradients": "gradients", "weights": "weights", "small weights": "weights", "updated weights": "weights"}


def step_time(layout: Layout, device: Device, operators: int) -> StepTime:
    """Estimate the time of an optimizer step.

    Args:
        layout: the model and its ranks.
        device: the GPU.
        operators: operators of a forward and backward pass.
    """
    forward, backward = _passes(layout, device, operators)
    seconds = dict.fromkeys(("selection", "rows", "gradients", "weights", "other"), 0.0)
    for message in step_messages(layout):
        seconds[_PART.get(message.purpose, "other")] += message_time(message, layout, device)
    stage = layout.settings.zero_stage
    if stage == 3 or layout.zero("overlap_comm", False) is True:
        seconds["gradients"] = max(0.0, seconds["gradients"] - backward)
    if stage == 3:
        seconds["weights"] = max(0.0, seconds["weights"] - forward - backward)
    return StepTime(compute=forward + backward, update=_update(layout, device), **seconds)


def message_time(message: Message, layout: Layout, device: Device) -> float:
    """Return the seconds of all calls of a collective."""
    ranks = message.ranks
    if ranks == 1:
        return 0.0
    replicas = max(1, layout.local_world // layout.settings.ep_size)
    on_a_node = min(ranks, layout.local_world, replicas if message.scope == "edp" else ranks)
    is_one_node = ranks == on_a_node
    seconds = message.calls * latency(ranks)
    if message.collective == "all_to_all":
        seconds += message.calls * ranks * PEER_S
        moved = message.bytes * (ranks - (1 if is_one_node else on_a_node)) / ranks
        bandwidth = device.link_bandwidth if is_one_node else device.network_bandwidth
    else:
        moved = message.bytes * (2 if message.collective == "all_reduce" else 1) * (ranks - 1) / ranks
        network = device.network_bandwidth * on_a_node
        bandwidth = device.link_bandwidth if is_one_node else min(device.link_bandwidth, network)
    return seconds + moved / (bandwidth * BANDWIDTH_SHARE)


def latency(ranks: int) -> float:
    """Return the seconds of a small all-reduce over ``ranks``."""
    after = next(i for i, (known, _) in enumerate(LATENCY_S) if ranks <= known or known == LATENCY_S[-1][0])
    (low, before), (high, beyond) = LATENCY_S[max(0, after - 1)], LATENCY_S[after]
    return before + (beyond - before) * math.log(ranks / low) / math.log(high / low) if ranks > 1 else 0.0


def _passes(layout: Layout, device: Device, operators: int) -> tuple[float, float]:
    """Return the seconds of the forward passes and of the backward passes of a step."""
    flops = flops_per_image(layout.config)
    images = layout.settings.micro_batch * layout.settings.accumulation
    rate = device.bf16_flops * EFFICIENCY * (1 if layout.settings.bf16 else FP32_SHARE)
    again = flops.forward if layout.config.model.activation_checkpointing else 0
    forward, backward = images * flops.forward / rate, images * (flops.training - flops.forward + again) / rate
    launching = operators * layout.settings.accumulation * OPERATOR_S
    longer = max(1.0, launching / (forward + backward))
    return forward * longer, backward * longer


def _update(layout: Layout, device: Device) -> float:
    edp = layout.topology.edp_size
    elements: float = layout.elements(False) + layout.elements(True)
    if layout.settings.zero_stage:
        elements = layout.elements(False) / layout.world + layout.elements(True) / edp
    touched = 4 * (2 + 4 + 1 + 2) + layout.weight_bytes  # master, moments, gradient, EMA, weight
    return elements * touched / (device.memory_bandwidth * BANDWIDTH_SHARE)
