"""Memory of one rank at the peak of an optimizer step, by part.

What DeepSpeed keeps follows from its source (0.19.8: `stage_1_and_2.py`, `stage3.py`, `unfused_optimizer.py`, and the
engine's ZeRO 0 path). Activations come from a simulated forward and backward pass, so they are those of the code that
trains. A step has three phases whose peaks differ: the backward pass, the reduction of gradients after it (ZeRO 0, and
ZeRO 1 without ``overlap_comm``), and the update. The largest decides.

Not included: the CUDA context, NCCL's buffers and the allocator's fragmentation, for which `RESERVED_BYTES` and
`FRAGMENTATION` make room in verdicts, and what sample grids need (a second copy of the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.planning.messages import ALLREDUCE_ELEMENTS, communication_bytes, routed_rows
from diffmoe_ds.planning.simulate import Passes

FP32 = 4
RESERVED_BYTES = 2 * 2**30
"""Memory of a GPU that tensors cannot use: CUDA context, kernels, NCCL's buffers (0.5 to 2 GiB as a rule)."""
FRAGMENTATION = 1.05
"""Reserved over allocated memory, with ``expandable_segments``."""


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a step besides the state, in bytes."""

    name: str
    """``backward``, ``reduce`` or ``update``."""
    gradients: int
    """Gradients, and the copies of them that are reduced."""
    buckets: int
    """DeepSpeed's buffers for gradients in flight."""
    activations: int
    """Saved activations."""
    temporary: int
    """Intermediate results, weights gathered for the pass (ZeRO 3), and the optimizer's."""

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.gradients + self.buckets + self.activations + self.temporary


@dataclass(frozen=True)
class StepMemory:
    """Memory of one rank, in bytes."""

    weights: int
    """Weights and buffers between steps, in the dtype of the forward pass."""
    master: int
    """fp32 master weights; 0 if the weights themselves are updated."""
    moments: int
    """The optimizer's moments, fp32: two of Adam, one of Lion."""
    ema: int
    """The averaged weights, fp32."""
    phase: Phase
    """The phase with the highest peak."""
    phases: tuple[Phase, ...]
    """All phases."""
    dispatch: int
    """Routed rows among the saved activations of this layout: as sent to experts, and as they came back."""
    host_checkpoint: int
    """Host memory of the copy that a checkpoint is written from."""
    host_optimizer: int
    """Host memory of offloaded optimizer state."""

    @property
    def total(self) -> int:
        """Peak of the rank's GPU memory."""
        return self.weights + self.master + self.moments + self.ema + self.phase.total

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of `total` by what they hold."""
        return {
            "weights": self.weights,
            "master_weights": self.master,
            "adam_moments": self.moments,
            "ema": self.ema,
            "gradients": self.phase.gradients,
            "buckets": self.phase.buckets,
            "activations": self.phase.activations,
            "temporary": self.phase.temporary,
        }


@dataclass(frozen=True)
class _Sizes:
    """Element counts that all stages use."""

    held: int
    """Parameters that this rank computes with."""
    largest: int
    """Of the largest of them."""
    updated: int
    """Elements that this rank updates."""
    width: int
    """Bytes of a weight."""


def step_memory(layout: Layout, passes: Passes) -> StepMemory:
    """Return the memory of one rank.

    Args:
        layout: the model and its ranks.
        passes: of this layout, or of one that differs in the EP size or ZeRO stage only.
    """
    stage = layout.settings.zero_stage
    sizes = _sizes(layout)
    phases = {0: _stage_0, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}[stage](layout, sizes, passes)
    offload = layout.zero("offload_optimizer", {}).get("device", "none") == "cpu"
    state = FP32 * sizes.updated
    moments = len(MOMENTS[layout.settings.json["optimizer"]["type"]])
    buffers = layout.config.tokens_per_image * layout.config.size.hidden_size  # positions
    if layout.config.is_text:
        buffers += layout.config.text_layout.values  # the null condition
    has_master = stage > 0 or layout.settings.bf16
    return StepMemory(
        weights=_weights(layout, sizes) + FP32 * buffers,
        master=state if has_master and not offload else 0,
        moments=0 if offload else moments * state,
        ema=0 if offload else state,
        phase=max(phases, key=lambda phase: phase.total),
        phases=tuple(phases),
        dispatch=_dispatch(layout),
        host_checkpoint=(2 + moments) * state,
        host_optimizer=(3 + moments) * state if offload else 0,  # the gradient, too
    )


def fits_in(memory_bytes: int, needed: int, reserved: int = RESERVED_BYTES) -> bool:
    """Return whether a device has enough memory, with room for what is not counted."""
    return needed * FRAGMENTATION + reserved <= memory_bytes


def _sizes(layout: Layout) -> _Sizes:
    numels = [p.numel for p in layout.parameters]
    if layout.settings.zero_stage == 3:
        updated = sum(-(-p.numel // _ranks(layout, p.is_expert)) for p in layout.parameters)
    elif layout.settings.zero_stage:
        updated = sum(group.partition for group in layout.groups)
    else:
        updated = sum(numels)
    return _Sizes(sum(numels), max(numels), updated, layout.weight_bytes)


def _ranks(layout: Layout, is_expert: bool) -> int:
    return layout.topology.edp_size if is_expert else layout.world


def _weights(layout: Layout, sizes: _Sizes) -> int:
    if layout.settings.zero_stage == 0:
        return sizes.held * sizes.width
    if layout.settings.zero_stage < 3:
        return sum(group.numel for group in layout.groups) * sizes.width
    persistent, _ = _persistent(layout)
    return (sizes.updated + persistent) * sizes.width


def _persistent(layout: Layout) -> tuple[int, int]:
    """Return the elements of weights that ZeRO 3 keeps on every rank, and of those that it gathers for a pass."""
    threshold = layout.zero("stage3_param_persistence_threshold", 1e5)
    shared = [p.numel for p in layout.parameters if _ranks(layout, p.is_expert) > 1]
    small = sum(numel for numel in shared if numel <= threshold)
    return small, sum(shared) - small


def _dispatch(layout: Layout) -> int:
    layers = layout.moe_layers
    if layout.config.model.activation_checkpointing and layout.settings.ep_size == 1:
        layers = min(layers, 1)
    return 2 * layers * routed_rows(layout) * layout.config.size.hidden_size * layout.weight_bytes


def _adam_temporaries(layout: Layout, elements: int) -> int:
    """Return the bytes of Adam's intermediate results for the largest tensor that it updates; Lion has none."""
    optimizer = layout.settings.json["optimizer"]
    in_place = optimizer["type"] == "Lion" or optimizer["params"].get("fused") is True
    return 0 if in_place else 2 * FP32 * elements


def _bucket(layout: Layout) -> int:
    return int(layout.zero("reduce_bucket_size", 5e8))


def _flat_copy(layout: Layout, limit: int) -> int:
    """Return the bytes of the flat copy in which gradients are reduced: of dense or of expert weights."""
    elements = min(limit, max(layout.elements(False), layout.elements(True)))
    wire = communication_bytes(layout)
    return elements * (layout.weight_bytes + (wire if wire != layout.weight_bytes else 0))


def _stage_0(layout: Layout, sizes: _Sizes, passes: Passes) -> list[Phase]:
    gradients = sizes.held * sizes.width
    kept = gradients if layout.settings.accumulation > 1 else 0
    fp32_gradients = sizes.held * FP32 if layout.settings.bf16 else 0
    squares = 2 * 8 * sizes.largest  # the norm is computed in fp64, tensor by tensor
    update = max(squares, fp32_gradients + _adam_temporaries(layout, sizes.largest))
    return [
        Phase("backward", kept, 0, passes.saved, passes.temporary),
        Phase("reduce", gradients + _flat_copy(layout, ALLREDUCE_ELEMENTS), 0, 0, 0),
        Phase("update", gradients, 0, 0, update),
    ]


def _stage_1_and_2(layout: Layout, sizes: _Sizes, passes: Passes) -> list[Phase]:
    """ZeRO 2, and ZeRO 1 with ``overlap_comm``, reduce during the backward pass; ZeRO 1 without it does so afterwards.

    Either way gradients move into a bucket, are reduced in a flat copy of it, and those of parameters of which this
    rank updates anything go into a buffer.
    """
    overlap = layout.zero("overlap_comm", False) is True
    is_early = layout.settings.zero_stage == 2 or overlap
    bucket = min(_bucket(layout), sizes.held)
    buckets = _bucket(layout) * sizes.width * (2 if overlap else 1)
    all_gradients = sizes.held * sizes.width
    owned = _owned(layout) * sizes.width
    flat = _flat_copy(layout, bucket)
    kept = 0  # of the micro-steps before
    if layout.settings.accumulation > 1:
        kept = owned if layout.settings.zero_stage == 2 else all_gradients
    phases = [Phase("backward", kept, buckets, passes.saved, passes.temporary)]
    if is_early:  # the first bucket is reduced while the activations of the remaining layers are alive
        left = round(passes.saved * (1 - bucket / sizes.held))
        phases.append(Phase("backward", max(owned, flat) + min(owned, kept), buckets, left, passes.temporary))
    else:
        outside = all_gradients - bucket * sizes.width
        phases.append(Phase("reduce", outside + max(flat, owned), buckets, 0, 0))
    temporary = max(_update_of(layout, group.partition) for group in layout.groups)
    return [*phases, Phase("update", owned, 0, 0, temporary)]


def _update_of(layout: Layout, elements: int) -> int:
    """Return the bytes beyond gradients and state while a flat partition is updated."""
    flat = elements * layout.weight_bytes
    fp32 = elements * FP32
    converting = flat + fp32 if layout.settings.bf16 else flat
    return max(converting, fp32 + _adam_temporaries(layout, elements))


def _owned(layout: Layout) -> int:
    """Return the elements of all parameters of which rank 0 updates at least a part."""
    total = 0
    for group in layout.groups:
        offset = 0
        for parameter in group.parameters:
            if offset >= group.partition:
                break
            total += parameter.numel
            offset += parameter.numel
    return total


def _stage_3(layout: Layout, sizes: _Sizes, passes: Passes) -> list[Phase]:
    _, gathered = _persistent(layout)
    partition = sizes.updated * sizes.width
    buckets = _bucket(layout) * sizes.width
    flat = min(_bucket(layout), sizes.held) * sizes.width
    share = min(sizes.updated, int(layout.zero("sub_group_size", 1e9)))
    update = share * FP32 + _adam_temporaries(layout, share)
    # gathered weights are kept for the backward pass; while they arrive, those in flight exist twice
    weights = (gathered + min(gathered, int(layout.zero("stage3_prefetch_bucket_size", 5e7)))) * sizes.width
    left = round(passes.saved * (1 - min(1, _bucket(layout) / sizes.held)))
    return [
        Phase("backward", partition, buckets, passes.saved, weights + passes.temporary),
        Phase("reduce", partition + flat, buckets, left, weights),
        Phase("update", partition, buckets, 0, update),
    ]
