"""Set up a run: build the model, shard it, and load the checkpoint that the run resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffmoe_ds.checkpoint.load import best_kind
from diffmoe_ds.checkpoint.metadata import FeatureNetwork
from diffmoe_ds.checkpoint.restore import restore_engine, restore_model, share_index
from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import Objective, make_objective
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.launch import local_device
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.model.conditioning import TextConditioner
from diffmoe_ds.model.dit import DiT, allocate
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.moe.correction_bias import CorrectionBiases
from diffmoe_ds.moe.expert_parallel import ExpertParallelMoE, make_part_of_pool, world_pool
from diffmoe_ds.moe.race_thresholds import RaceThresholds
from diffmoe_ds.moe.thresholds import Thresholds
from diffmoe_ds.text_features import TextFormat
from diffmoe_ds.topology import Topology
from diffmoe_ds.training.ema import EMA
from diffmoe_ds.training.plan import TrainPlan
from diffmoe_ds.training.prompts import GridPrompts
from diffmoe_ds.training.resume import continued

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine  # at run time only the seam imports it, after choosing the accelerator


@dataclass
class Run:
    """The state of a run between two steps."""

    config: Config
    """The recipe."""
    settings: DeepSpeedSettings
    """The resolved DeepSpeed JSON."""
    topology: Topology
    """The ranks and the expert placement."""
    directory: Path
    """The run directory."""
    owner: Owner
    """Owner of the run directory."""
    engine: DeepSpeedEngine
    """The DeepSpeed engine: sharded model and optimizer."""
    model: DiT
    """The engine's model."""
    objective: Objective
    """Flow or DDPM."""
    ema: EMA
    """The averaged weights."""
    thresholds: Thresholds
    """The moving thresholds of dynamic inference."""
    router_states: tuple[CorrectionBiases | RaceThresholds, ...]
    """What else the routers update once per step."""
    held_out: HeldOut | None = None
    """The held-out images, if the run evaluates."""
    images: int = 0
    """Images trained on so far."""
    step: int = 0
    """Optimizer steps so far."""
    began_from: str | None = None
    """The absolute PATH of the ``--resume PATH`` that the run began with; the same command resumes the run itself."""
    class_names: tuple[str, ...] | None = None
    """Name of each label, if labels have names."""
    text: TextFormat | None = None
    """The encoders of a text model."""
    repa_network: FeatureNetwork | None = None
    """The network of the image features, with REPA."""
    prompts: GridPrompts | None = None
    """The prompts of the sample grids of a text model."""
    again: str = "the same command"
    """How to resume, for messages."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.topology.rank == 0

    @property
    def is_complete(self) -> bool:
        """Whether the run has seen all of its images."""
        return self.images >= self.config.run.total_images

    def advance(self) -> None:
        """Count a finished optimizer step."""
        self.images += self.settings.global_batch
        self.step += 1

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        device: torch.device = self.engine.device
        return device


def setup_run(plan: TrainPlan, owner: Owner) -> Run:
    """Build the model, shard it, and load the checkpoint if there is one. Every rank must call this.

    The process group must exist. Weights are loaded before DeepSpeed sees the model, so that its low-precision copies
    are made from them; master weights and moments are written into its partitions afterwards.

    Args:
        plan: the plan that all ranks agreed on.
        owner: of the run directory.

    Raises:
        CheckpointError: on all ranks, if any rank cannot read its part.
    """
    settings, reader = plan.settings, plan.reader
    config = plan.config if reader is None else continued(plan.config, reader.config)
    topology = Topology(plan.launch.rank, plan.launch.world, settings.ep_size, config.num_experts)
    model = build_model(config, topology, micro_batch=settings.micro_batch)
    _fill(model, plan, topology)
    seam.tag_expert_weights(model)
    engine = seam.initialize(model, settings.json)
    engine.train()
    if config.model.compile:
        compile_blocks(model)
    fragments = seam.fragments(engine)
    run = Run(
        config=config,
        settings=settings,
        topology=topology,
        directory=plan.directory,
        owner=owner,
        engine=engine,
        model=model,
        objective=make_objective(config.objective.kind, config.objective.min_snr_gamma),
        ema=EMA(fragments, seam.parts(engine)),
        thresholds=Thresholds(model.moe_layers().values(), config.routing, topology.world),
        router_states=(
            CorrectionBiases(model.moe_layers().values(), config.routing.bias_rate, world_pool(topology)),
            RaceThresholds(model.moe_layers().values(), config.routing.threshold_decay),
        ),
        held_out=plan.held_out,
        began_from=plan.began_from,
        text=plan.text,
        repa_network=plan.repa_network,
        again="the same command" + (" with --resume auto" if plan.resume == "none" else ""),
    )
    if reader is not None:
        restore_engine(engine, reader, fragments, run.ema.values, run.ema.parts)
        reader.close()  # so that its disk space is freed when it is removed
        run.images, run.step = reader.metadata.images, reader.metadata.step
    return run


def _fill(model: DiT, plan: TrainPlan, topology: Topology) -> None:
    """Fill a model with the weights that the run starts from. Every rank must call this."""
    device = local_device(plan.launch)
    if plan.reader is not None:
        share_index(plan.reader, device)
        restore_model(model, plan.reader, topology, "fp32", device)
        return
    init_weights(model, plan.config.run.seed, topology.first_expert)
    if isinstance(model.y_embedder, TextConditioner):
        assert plan.text is not None, "checked by `with_text`"
        model.y_embedder.null_row.copy_(torch.from_numpy(plan.text.null_row))
    if plan.initial is not None:
        share_index(plan.initial, device)
        restore_model(model, plan.initial, topology, best_kind(plan.initial), device)
        plan.initial.close()


def compile_blocks(model: DiT) -> None:
    """Compile each block separately, in place: names of parameters, and so checkpoints, do not change.

    Blocks with the same kind of FFN share their code, so the time to compile does not grow with the depth.
    """
    for block in model.blocks:
        block.compile()


def build_model(
    config: Config,
    topology: Topology,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    micro_batch: int | None = None,
) -> DiT:
    """Return the model with this rank's experts and uninitialized weights. Every rank must call this.

    Args:
        config: the run's configuration.
        topology: the ranks and the expert placement.
        device: the device of the weights.
        dtype: of the weights.
        micro_batch: images per rank, used for `routing.pool_images` in training; None for inference.
    """
    ep_group = seam.expert_parallel_group(topology.ep_size)
    part = make_part_of_pool(config.routing.pool_images, micro_batch, topology, ep_group)
    with torch.device("meta"):
        model = DiT(config, partial(ExpertParallelMoE, topology=topology, ep_group=ep_group, part_of_pool=part))
    return allocate(model, device, dtype)
