"""Everything a run needs before its first step, in the order in which it comes to exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader, best_kind, restore_engine, restore_weights
from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import Objective, make_objective
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.moe.capacity import tokens_per_expert
from diffmoe_ds.moe.expert_parallel import ExpertParallelMoE
from diffmoe_ds.moe.thresholds import Thresholds
from diffmoe_ds.topology import Topology
from diffmoe_ds.training.ema import EMA

T = TypeVar("T")


@dataclass
class Run:
    """A run between two steps."""

    config: Config
    """What it does."""
    settings: DeepSpeedSettings
    """How DeepSpeed does it."""
    topology: Topology
    """The ranks."""
    directory: Path
    """Where everything it writes goes."""
    engine: DeepSpeedEngine
    """The model, its optimizer and their shards."""
    model: DiT
    """The engine's model."""
    objective: Objective
    """Flow or DDPM."""
    ema: EMA
    """The averaged weights."""
    thresholds: Thresholds
    """The moving thresholds."""
    images: int = 0
    """Images seen so far."""
    step: int = 0
    """Optimizer steps made so far."""
    began_from: str | None = None
    """The absolute PATH of ``--resume PATH``, if that is how it began; given again, it goes on from its own newest."""
    again: str = "the same command"
    """What a user starts to continue it."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
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
        return self.engine.device


def pool_rows(config: Config, settings: DeepSpeedSettings, world: int) -> tuple[int, int]:
    """(tokens T of a pool, rows K that an expert takes from it) of one micro-batch.

    Raises:
        ConfigError: the pool is too small for an expert to take one token.
    """
    ranks = {"rank": 1, "ep": settings.ep_size, "world": world}[config.routing.pool]
    tokens = settings.micro_batch * ranks * config.tokens_per_image
    rows = tokens_per_expert(config.routing.capacity, tokens, config.num_experts)
    if rows < 1:
        raise ConfigError(
            f"routing.capacity is {config.routing.capacity}: a pool of {tokens} tokens gives each of "
            f"{config.num_experts} experts less than one; raise the capacity or the micro-batch."
        )
    return tokens, rows


def setup_run(
    config: Config, settings: DeepSpeedSettings, launch: Launch, directory: Path, reader: CheckpointReader | None,
    source: WeightsReader | None,
) -> Run:  # fmt: skip
    """Build the model, shard it, and continue from a checkpoint if there is one.

    The process group must exist.  Weights come into the model before DeepSpeed sees it, so that DeepSpeed's
    low-precision copies are made from them; master weights and moments are written into its partitions after.

    Args:
        config: what to train.
        settings: how DeepSpeed does it.
        launch: this rank's place.
        directory: where the run writes.
        reader: the checkpoint that the run continues; none begins a new one.
        source: the model that a new run begins with; none draws its weights.

    Raises:
        CheckpointError: on all ranks, if any cannot read its part.
    """
    topology = Topology(launch.rank, launch.world, settings.ep_size, config.num_experts)
    model = build_model(config, topology)
    if reader is None:
        init_weights(model, config.run.seed, topology.first_expert)
    if reader is not None:
        together(lambda: restore_weights(model, reader, topology, "fp32"))
    elif source is not None:
        together(lambda: restore_weights(model, source, topology, best_kind(source)))
    seam.tag_expert_weights(model)
    engine = seam.initialize(model, settings.json)
    engine.train()
    fragments = seam.fragments(engine)
    run = Run(
        config=config,
        settings=settings,
        topology=topology,
        directory=directory,
        engine=engine,
        model=model,
        objective=make_objective(config.objective.kind),
        ema=EMA(fragments, seam.parts(engine), config.ema.decay),
        thresholds=Thresholds(model.moe_layers().values(), config.routing),
    )
    if reader is not None:
        together(lambda: restore_engine(engine, reader, fragments, run.ema.values))
        run.images, run.step = reader.meta["images"], reader.meta["step"]
    return run


def build_model(config: Config, topology: Topology) -> DiT:
    """The model with this rank's experts, its weights still empty."""
    ep_group = seam.expert_parallel_group(topology.ep_size)
    with torch.device("meta"):
        model = DiT(config, partial(ExpertParallelMoE, topology=topology, ep_group=ep_group))
    return model.to_empty(device="cpu")


def together(action: Callable[[], T]) -> T:
    """Do something that only one rank may fail to do; then all raise, instead of waiting for it."""
    failure = result = None
    try:
        result = action()
    except CheckpointError as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=seam.device())
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.item():
        raise CheckpointError("another rank could not read or write its part.")
    return result
