"""The plan of ``diffmoe sample`` and of ``evaluate --checkpoint``: the options, resolved against the checkpoint."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffmoe_ds.checkpoint.export import WEIGHTS, digest_of, initial_weights_warning, require_weights
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind
from diffmoe_ds.cli.sample_images import ImageSet, choose_images
from diffmoe_ds.cli.sampling_options import check_sharded_sampler, open_guide, resolve_settings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import ConfigError, TopologyError
from diffmoe_ds.model.dit import empty_model
from diffmoe_ds.sampling.capacity import check_capacity
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, SamplingSettings
from diffmoe_ds.sampling.guidance import guided_channels
from diffmoe_ds.sampling.samplers import ADAPTIVE
from diffmoe_ds.text import counted
from diffmoe_ds.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The values of ``--dtype``."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS_NAMES = {kind: name for name, kind in WEIGHTS.items()}


@dataclass(frozen=True)
class SamplingPlan:
    """The resolved arguments."""

    reader: WeightsReader
    """The model's weights and configuration."""
    kind: str
    """Which weights to read: a kind of the reader."""
    routing: str
    """The experts' inference rule."""
    images_compete: bool
    """Whether an image depends on the rest of its batch, in this model or in the guiding one."""
    settings: SamplingSettings
    dtype: str | None
    """``fp32``, ``bf16``, or None for the default of the device."""
    topology: Topology
    """The ranks and the expert placement."""
    vae: str | None
    """The decoder of a latent model."""
    images: ImageSet
    """The images to generate."""
    batch_size: int
    """Images per batch."""
    capacity: float | None
    """Average number of experts per token; None keeps the trained capacity."""
    guide: SamplingPlan | None = None
    """How to load the guiding model of autoguidance."""


def plan_sampling(args: argparse.Namespace, launch: Launch) -> SamplingPlan:
    """Resolve the arguments against the checkpoint, without loading weights.

    Raises:
        CheckpointError: the checkpoint does not exist or is damaged.
        ConfigError: an argument does not fit the model.
        TopologyError: the experts cannot be sharded over the ranks.
    """
    reader = require_weights(args.checkpoint, "--checkpoint")
    config = reader.config
    channels = config.model.in_channels
    if args.vae is not None and channels in PIXEL_CHANNELS:
        raise ConfigError(f"{reader.path}: the model generates pixels ({channels} channels); omit --vae.")
    if args.vae is None and channels not in PIXEL_CHANNELS:
        raise ConfigError(
            f"{reader.path}: the model generates latents ({channels} channels); pass --vae to decode them to pixels."
        )
    settings = resolve_settings(args, config)
    routing = args.routing or config.inference_choices[0]
    if args.capacity is not None:
        check_capacity(args.capacity, routing, config)
    plan = SamplingPlan(
        reader=reader,
        kind=best_kind(reader) if args.weights is None else WEIGHTS[args.weights],
        routing=routing,
        images_compete=do_images_compete(config, routing),
        settings=settings,
        dtype=args.dtype,
        topology=place_experts(args.experts, launch, config.num_experts),
        vae=args.vae,
        images=choose_images(args, reader),
        batch_size=args.batch_size,
        capacity=args.capacity,
    )
    guide = open_guide(settings, config)
    if guide is not None:
        guide_plan = plan_guide(plan, guide, args.experts, launch)
        plan = replace(plan, guide=guide_plan, images_compete=plan.images_compete or guide_plan.images_compete)
    for each in (plan, plan.guide):
        if each is not None:
            check_sharded_sampler(settings, each.topology.ep_size)
    return plan


def plan_guide(plan: SamplingPlan, reader: WeightsReader, experts: str, launch: Launch) -> SamplingPlan:
    """Return the plan that loads the guiding model, with its own weights, routing and expert placement.

    Args:
        plan: the plan of the guided model.
        reader: the weights of the guiding model.
        experts: see `place_experts`.
        launch: the ranks.

    Raises:
        ConfigError: its text encoders are not those of the guided model.
        TopologyError: the guiding model's experts cannot be sharded over the ranks.
    """
    config = reader.config
    if _encoders(reader) != _encoders(plan.reader):
        raise ConfigError(
            f"--autoguidance {reader.path} was trained with text encoders other than those of {plan.reader.path}."
        )
    topology = place_experts(experts, launch, config.num_experts)
    routing = config.inference_choices[0]
    return replace(
        plan,
        reader=reader,
        kind=best_kind(reader),
        routing=routing,
        images_compete=do_images_compete(config, routing),
        topology=topology,
    )


def do_images_compete(config: Config, routing: str) -> bool:
    """Return whether an image depends on the rest of its batch under an inference rule.

    Raises:
        ConfigError: the model does not support the rule.
    """
    outline = empty_model(config)
    outline.set_inference(routing)
    return outline.images_compete


def place_experts(choice: str, launch: Launch, num_experts: int) -> Topology:
    """Return the ranks and the expert placement.

    Args:
        choice: ``gathered``: every rank holds all experts; ``sharded``: EP groups, as large as possible, share them.
        launch: the ranks.
        num_experts: E; 1 for a dense model.

    Raises:
        TopologyError: no EP size above 1 divides both the ranks and the experts.
    """
    ep_size = math.gcd(launch.world, num_experts) if choice == "sharded" else 1
    if choice == "sharded" and ep_size == 1 and launch.world > 1 and num_experts > 1:
        raise TopologyError(
            f"--experts sharded needs a number of ranks that has a common divisor with the {num_experts} experts, "
            f"got {launch.world}; use {num_experts} ranks, or --experts gathered."
        )
    return Topology(launch.rank, launch.world, ep_size, num_experts)


def dtype_of(plan: SamplingPlan, device: torch.device) -> torch.dtype:
    """Return the type of weights and activations."""
    return DTYPES[plan.dtype] if plan.dtype else default_dtype(device)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on GPUs that support it, as ``"auto"`` does in training, and fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def describe(plan: SamplingPlan, dtype: torch.dtype) -> str:
    """Return lines that describe the weights and the sampler settings."""
    settings, reader = plan.settings, plan.reader
    trained = f"trained on {reader.images:,} images" if reader.images else "number of training images unknown"
    tolerances = settings.tolerances
    steps = f"{settings.steps} step{'' if settings.steps == 1 else 's'}"
    if settings.sampler in ADAPTIVE:
        steps = f"tolerances {tolerances.rtol:g} and {tolerances.atol:g}"
    how = [settings.sampler, steps, f"guidance {settings.cfg_scale:g}"]
    if settings.guidance_interval is not None:
        how.append("from noise level {:g} to {:g}".format(*settings.guidance_interval))
    channels = reader.config.model.in_channels
    guided = guided_channels(reader.config.objective.kind, settings.guide_channels, channels)
    if settings.cfg_scale != 1 and (settings.guide_channels is not None or guided < channels):
        how.append(f"in {guided} of {counted(channels, 'channel')}")
    if plan.guide is not None:
        how.append(f"by {plan.guide.reader.path}")
    if reader.config.num_experts > 1:
        how.append(f"routing {plan.routing}")
    model = f"{reader.path}, {WEIGHTS_NAMES[plan.kind]} weights, {trained}"
    lines = [("weights", model), ("sampler", ", ".join([*how, DTYPE_NAMES[dtype]]))]
    has_classes = reader.config.is_text or reader.config.model.num_classes > 1
    if settings.cfg_scale != 1 and plan.guide is None and not has_classes:
        lines.append(("note", "guidance hardly changes images of a model without classes, and takes twice the time"))
    warning = initial_weights_warning(reader, WEIGHTS_NAMES[plan.kind])
    if warning is not None:
        lines.append(("warning", warning))
    return "\n".join(f"{name:>11}  {text}" for name, text in lines)


def sources(plan: SamplingPlan) -> str:
    """Return what all ranks must agree on: the sampler, and the files and kinds of all weights."""
    models = (plan,) if plan.guide is None else (plan, plan.guide)
    return " ".join([plan.settings.sampler, *(f"{model.reader.path} {model.kind}" for model in models)])


def model_settings(plan: SamplingPlan, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything but the capacity that determines the model's output for a seed and a label."""
    found = {
        "checkpoint": _identity(plan.reader),
        "weights": WEIGHTS_NAMES[plan.kind],
        **effective_settings(plan.settings, plan.reader.config),
        "routing": plan.routing,
        "dtype": DTYPE_NAMES[dtype],
    }
    if plan.guide is not None:
        found["autoguidance"] = _identity(plan.guide.reader)
    if plan.images.prompts is not None and plan.reader.text is not None:
        found.update(plan.images.prompts.settings(plan.reader.text))
    return found


def effective_settings(settings: SamplingSettings, config: Config) -> dict[str, Any]:
    """Return the settings that have an effect, with defaults filled in, keyed by option name."""
    found = {
        "sampler": settings.sampler,
        "cfg_scale": settings.cfg_scale,
        "guidance_interval": settings.guidance_interval,
    }
    if settings.sampler in ADAPTIVE:
        found.update(asdict(settings.tolerances))
    else:
        found["steps"] = settings.steps
    if settings.cfg_scale != 1:
        found["guide_channels"] = guided_channels(
            config.objective.kind, settings.guide_channels, config.model.in_channels
        )
    return found


def determining_settings(plan: SamplingPlan, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that determines the bytes of the images, keyed by option name."""
    images = plan.images
    found = {
        **model_settings(plan, dtype),
        "capacity": plan.capacity,
        "vae": plan.vae,
        "num_images": images.num_images,
        "seed": images.seed,
        "classes": images.classes,
        "labels": images.labels,
    }
    if plan.images_compete:
        found["batch_size"] = plan.batch_size
    return found


def _encoders(reader: WeightsReader) -> list[str]:
    """Return the SHA-256 of a model's text encoders."""
    return [] if reader.text is None else [encoder.sha256 for encoder in reader.text.encoders]


def _identity(reader: WeightsReader) -> str:
    return f"{reader.path.name} (SHA-256 {digest_of(reader)[:16]})"
