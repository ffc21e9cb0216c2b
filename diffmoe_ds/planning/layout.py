"""A model on a cluster: what every other module of `planning` computes with.

Legend: W ranks, P ranks of an EP group, E experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from diffmoe_ds.config.deepspeed import DeepSpeedSettings, resolve_deepspeed
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.planning.pool import pool_ranks, pool_rows, selection_ranks
from diffmoe_ds.topology import Topology

MAX_EXPERT_GROUP = 178_956_971
"""Elements from which on DeepSpeed splits the experts' parameter group (``deepspeed/moe/utils.py``)."""
START_ALIGNMENT = 2
"""DeepSpeed pads flat groups to a multiple of this times the number of ranks."""


class Parameter(NamedTuple):
    """A parameter as one rank holds it during the forward pass."""

    numel: int
    """Elements; of an expert weight, those of the experts held here."""
    is_expert: bool
    """Whether it is shared by the expert replicas only."""


class Group(NamedTuple):
    """Parameters that DeepSpeed flattens, partitions and updates together (ZeRO 1 and 2)."""

    parameters: tuple[Parameter, ...]
    """In the order of the flat tensor."""
    ranks: int
    """Ranks that hold and partition it: W, or the replicas of an expert."""

    @property
    def is_expert(self) -> bool:
        """Whether these are expert weights."""
        return self.parameters[0].is_expert

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        unit = START_ALIGNMENT * self.ranks
        return math.ceil(sum(p.numel for p in self.parameters) / unit) * unit

    @property
    def partition(self) -> int:
        """Elements that one rank updates."""
        return self.numel // self.ranks


@dataclass(frozen=True)
class Layout:
    """One configuration of model, ranks and DeepSpeed."""

    config: Config
    """The recipe."""
    settings: DeepSpeedSettings
    """Its resolved DeepSpeed JSON."""
    world: int
    """Ranks W, one per GPU."""
    local_world: int
    """Ranks per node."""

    @property
    def topology(self) -> Topology:
        """The ranks, seen from rank 0."""
        return Topology(0, self.world, self.settings.ep_size, self.config.num_experts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, activations and gradients."""
        return torch.bfloat16 if self.settings.bf16 else torch.float32

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens of one rank's micro-batch."""
        return self.settings.micro_batch * self.config.tokens_per_image

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return len(self.config.moe_blocks)

    @property
    def pool_ranks(self) -> int:
        """Ranks over which thresholds are searched and tokens are counted."""
        return pool_ranks(self.config, self.settings, self.world)

    @property
    def selection_ranks(self) -> int:
        """Ranks over which tokens are selected."""
        return selection_ranks(self.config, self.settings, self.world)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of one rank, in the model's order."""
        make_moe = partial(MoELayer, num_local_experts=self.topology.num_local_experts)
        with torch.device("meta"):
            model = DiT(self.config, make_moe)
        experts = {id(p) for layer in model.moe_layers().values() for p in layer.experts.parameters()}
        return tuple(Parameter(p.numel(), id(p) in experts) for p in model.parameters())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of ZeRO 1 and 2: all dense weights, then the experts in groups of limited size."""
        dense = [p for p in self.parameters if not p.is_expert]
        parts: list[list[Parameter]] = []
        for parameter in self.parameters:
            if parameter.is_expert:
                if not parts or sum(p.numel for p in parts[-1]) + parameter.numel > MAX_EXPERT_GROUP:
                    parts.append([])
                parts[-1].append(parameter)
        experts = [Group(tuple(part), self.topology.edp_size) for part in parts]
        return (Group(tuple(dense), self.world), *experts)

    def elements(self, is_expert: bool) -> int:
        """Return the elements of this rank's dense or expert parameters."""
        return sum(p.numel for p in self.parameters if p.is_expert == is_expert)

    def zero(self, key: str, default: Any) -> Any:
        """Return a value of the JSON's ``zero_optimization``."""
        return self.settings.json["zero_optimization"].get(key, default)

    def with_checkpointing(self, on: bool) -> Layout:
        """Return the same layout with or without activation checkpointing."""
        model = self.config.model.model_copy(update={"activation_checkpointing": on})
        return replace(self, config=self.config.model_copy(update={"model": model}))


@dataclass(frozen=True)
class LayoutRequest:
    """What a user asks about; None leaves a value to the DeepSpeed JSON."""

    world: int
    """Ranks W, one per GPU."""
    local_world: int
    """Ranks per node."""
    ep_size: int | None = None
    """Expert-parallel size P."""
    zero_stage: int | None = None
    """0 to 3."""
    micro_batch: int | None = None
    """Images per forward pass of a rank."""
    accumulation: int | None = None
    """Forward passes per optimizer step."""
    bf16: bool | None = None
    """Weights in bf16 with fp32 master weights, or everything in fp32."""


def resolve_layout(request: LayoutRequest, config: Config, raw: dict[str, Any], source: str) -> Layout:
    """Resolve a layout as a run on GPUs would.

    Args:
        request: replaces values of the DeepSpeed JSON.
        config: the recipe.
        raw: the DeepSpeed JSON.
        source: its name, for errors.

    Raises:
        ConfigError: the JSON is invalid or contradicts the request, or the pool is too small.
        TopologyError: the EP size does not divide the experts and the ranks.
    """
    tree = copy.deepcopy(raw)
    if request.zero_stage is not None:
        tree.setdefault("zero_optimization", {})["stage"] = request.zero_stage
    if request.ep_size is not None:
        tree.setdefault("expert_parallel", {})["autoep_size"] = request.ep_size
    if request.bf16 is not None:
        tree["bf16"] = {"enabled": request.bf16}
    if request.micro_batch is not None:
        tree["train_micro_batch_size_per_gpu"] = request.micro_batch
        tree["train_batch_size"] = "auto"
    else:
        _check_batch(tree, request.world, source)
    if request.accumulation is not None:
        tree["gradient_accumulation_steps"] = request.accumulation
    local_world = min(request.local_world, request.world)
    settings = resolve_deepspeed(tree, config, source, world=request.world, local_world=local_world, device="cuda")
    if config.has_pool:
        pool_rows(config, settings, request.world)
    return Layout(config, settings, request.world, local_world)


def _check_batch(tree: dict[str, Any], world: int, source: str) -> None:
    """Check that the JSON's batch can be split over the ranks, as the user of a planner can simply choose another."""
    batch, micro = tree.get("train_batch_size"), tree.get("train_micro_batch_size_per_gpu")
    if isinstance(batch, int) and not isinstance(micro, int) and batch % world:
        raise ConfigError(
            f"{source}: train_batch_size must be a multiple of the {world} GPUs, got {batch}; choose the images per "
            "GPU with --micro-batch."
        )
