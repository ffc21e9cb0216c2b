"""Implementation of ``diffmoe sample``: plan, join the ranks, generate a share of the images on each, write on rank 0.

The ranks agree on errors after each phase, so that no rank waits for a failed one and the user reads one message.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_ds.checkpoint.export import WEIGHTS, open_weights
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind, restore_weights
from diffmoe_ds.cli.sampling_options import check_sharded_sampler, open_guide, resolve_settings
from diffmoe_ds.distributed import consensus
from diffmoe_ds.distributed.collectives import gather_to_main, init_process_group
from diffmoe_ds.distributed.launch import Launch, local_device, resolve_launch
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.rendezvous import join_ranks
from diffmoe_ds.errors import CheckpointError, ConfigError, NonFiniteError, TopologyError
from diffmoe_ds.files import write_together
from diffmoe_ds.model.dit import DiT, allocate, empty_model
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, SamplingSettings, generate, labels_of, share_of_rank
from diffmoe_ds.sampling.grid import Pixels, grid_columns, make_grid, save_png, to_uint8
from diffmoe_ds.topology import Topology

GRID_IMAGES = 100
"""Largest number of images in grid.png."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The values of ``--dtype``."""

T = TypeVar("T")


@dataclass(frozen=True)
class SamplingPlan:
    """The resolved arguments."""

    reader: WeightsReader
    """The model's weights and configuration."""
    kind: str
    """Which weights to read: a kind of the reader."""
    routing: str
    """The inference rule of the experts."""
    settings: SamplingSettings
    dtype: str | None
    """``fp32``, ``bf16``, or None for the default of the device."""
    topology: Topology
    """The ranks and the expert placement."""
    vae: str | None
    """The decoder of a latent model."""
    num_images: int
    seed: int
    batch_size: int
    out: Path
    guide: SamplingPlan | None = None
    """How to load the second model of autoguidance."""


def run_sampling(args: argparse.Namespace) -> None:
    """Generate images on all ranks and write them on rank 0.

    Args:
        args: of `cli.sample.add_sample_arguments`, with valid numbers.

    Raises:
        DiffMoEError: on all ranks, if any rank fails.
    """
    launch = resolve_launch()
    rendezvous = join_ranks(launch)
    plan = rendezvous.raise_on_all_ranks("plan", lambda: plan_sampling(args, launch))
    same = f"{plan.reader.path} {plan.settings.sampler}"
    rendezvous.check_same("model", same, "samples a different checkpoint than rank 0; pass the path of one checkpoint.")
    device = local_device(launch)
    set_tf32(True)
    if launch.world > 1:
        if launch.rank == 0:
            print(f"{'launch':>11}  {rendezvous.launch.describe()}", flush=True)
        models = (plan,) if plan.guide is None else (plan, plan.guide)
        create_groups(max((model.topology for model in models), key=lambda topology: topology.ep_size), device)
    model = rendezvous.raise_on_all_ranks("weights", lambda: load_model(plan, device))
    guide = rendezvous.raise_on_all_ranks("guide", lambda: load_guide(plan, device))
    decode = rendezvous.raise_on_all_ranks("vae", lambda: load_decoder(plan, device))
    rendezvous.on_main("out", lambda: _make_folder(plan.out))
    if launch.world == 1:
        write_images(plan, generate_share(plan, model, decode, launch, guide))
        return
    every = gather_to_main(torch.from_numpy(generate_share(plan, model, decode, launch, guide)))
    pixels = None if every is None else torch.cat(every).numpy()
    _raise_on_all_ranks(launch, lambda: None if pixels is None else write_images(plan, pixels))


def plan_sampling(args: argparse.Namespace, launch: Launch) -> SamplingPlan:
    """Resolve the arguments against the checkpoint, without loading weights.

    Raises:
        CheckpointError: the checkpoint does not exist or is damaged.
        ConfigError: an argument does not fit the model.
        TopologyError: the experts cannot be sharded over the ranks.
    """
    reader = open_weights(args.checkpoint)
    if reader is None:
        raise CheckpointError(f"--checkpoint {args.checkpoint}: not a checkpoint, run directory or exported model.")
    config = reader.config
    channels = config.model.in_channels
    if args.vae is not None and channels in PIXEL_CHANNELS:
        raise ConfigError(f"{reader.path}: the model generates pixels ({channels} channels); omit --vae.")
    if args.vae is None and channels not in PIXEL_CHANNELS:
        raise ConfigError(
            f"{reader.path}: the model generates latents ({channels} channels); pass --vae to decode them to pixels."
        )
    settings = resolve_settings(args, config)
    plan = SamplingPlan(
        reader=reader,
        kind=best_kind(reader) if args.weights is None else WEIGHTS[args.weights],
        routing=args.routing or config.inference_choices[0],
        settings=settings,
        dtype=args.dtype,
        topology=place_experts(args.experts, launch, config.num_experts),
        vae=args.vae,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        out=args.out,
    )
    guide = open_guide(settings, config)
    if guide is not None:
        plan = replace(plan, guide=plan_guide(plan, guide, args.experts, launch))
    for each in (plan, plan.guide):
        if each is not None:
            check_sharded_sampler(settings, each.topology.ep_size)
    return plan


def plan_guide(plan: SamplingPlan, reader: WeightsReader, experts: str, launch: Launch) -> SamplingPlan:
    """Return the plan that loads the second model of autoguidance, with its own weights, routing and placement.

    Args:
        plan: the plan of the guided model.
        reader: the weights of the second model.
        experts: see `place_experts`.
        launch: the ranks.

    Raises:
        TopologyError: the second model's experts cannot be sharded over the ranks.
    """
    config = reader.config
    topology = place_experts(experts, launch, config.num_experts)
    routing = config.inference_choices[0]
    return replace(plan, reader=reader, kind=best_kind(reader), routing=routing, topology=topology)


def place_experts(choice: str, launch: Launch, num_experts: int) -> Topology:
    """Return the ranks and the expert placement.

    Args:
        choice: ``gathered``: every rank holds all experts; ``sharded``: EP groups as large as possible share them.
        launch: the ranks.
        num_experts: E; 1 for a dense model.

    Raises:
        TopologyError: no EP size above 1 divides both the ranks and the experts.
    """
    ep_size = math.gcd(launch.world, num_experts) if choice == "sharded" else 1
    if choice == "sharded" and ep_size == 1 and launch.world > 1 and num_experts > 1:
        raise TopologyError(
            f"--experts sharded needs a number of ranks that has a common divisor with the {num_experts} experts, got "
            f"{launch.world}; use {num_experts} ranks, or --experts gathered."
        )
    return Topology(launch.rank, launch.world, ep_size, num_experts)


def create_groups(topology: Topology, device: torch.device) -> None:
    """Create the process groups: gloo for errors and pixels, and the device's own for rows of sharded experts."""
    if topology.ep_size == 1:
        init_process_group("gloo")
        return
    if topology.rank == 0:
        held = f"{topology.num_local_experts} of {topology.num_experts} on each rank"
        print(f"{'experts':>11}  {held}, EP size {topology.ep_size}", flush=True)
    init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    quiet_deepspeed()
    from diffmoe_ds.distributed import deepspeed_seam  # imported lazily: only sharded experts need DeepSpeed

    deepspeed_seam.init_process_group()  # adopts the group


def load_model(plan: SamplingPlan, device: torch.device) -> DiT:
    """Return the model with this rank's experts, in eval mode on the device. Every rank must call this.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the model does not support the routing.
    """
    config, topology = plan.reader.config, plan.topology
    dtype = DTYPES[plan.dtype] if plan.dtype else default_dtype(device)
    if topology.ep_size == 1:
        model = allocate(empty_model(config), device, dtype)
    else:
        from diffmoe_ds.training.setup import build_model  # imports DeepSpeed

        # Images compete with those of the same rank's batch only, as they do where every rank holds all experts.
        routing = config.routing.model_copy(update={"pool": "rank"})
        model = build_model(config.model_copy(update={"routing": routing}), topology, device, dtype)
    model.set_inference(plan.routing)
    restore_weights(model, plan.reader, topology, plan.kind)
    return model.eval()


def load_guide(plan: SamplingPlan, device: torch.device) -> DiT | None:
    """Return the second model of autoguidance, if there is one; see `load_model`."""
    return None if plan.guide is None else load_model(plan.guide, device)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on GPUs that compute in it, as ``"auto"`` does in training, and fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def load_decoder(plan: SamplingPlan, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that decodes the model's output to pixels in about [-1, 1].

    Raises:
        ConfigError: the VAE cannot be loaded or decodes another number of channels.
    """
    if plan.vae is None:
        return lambda pixels: pixels
    from diffmoe_ds.data.vae import VAE  # imports diffusers, an extra

    vae, channels = VAE(plan.vae, device), plan.reader.config.model.in_channels
    if vae.settings["latent_channels"] != channels:
        raise ConfigError(
            f"--vae {plan.vae} decodes latents of {vae.settings['latent_channels']} channels, but the model generates "
            f"{channels}."
        )
    return vae.decode


def generate_share(
    plan: SamplingPlan, model: DiT, decode: Callable[[Tensor], Tensor], launch: Launch, guide: DiT | None
) -> Pixels:
    """Generate this rank's share of the images; if any rank fails, all raise.

    All ranks run the same number of batches of the same sizes, so that ranks that share experts stay in step.

    Returns:
        uint8 [n, H, W, C], the same n on all ranks; shares past the last image are padded with further seeds.
    """
    seeds = share_of_rank(plan.num_images, plan.seed, launch.rank, launch.world)
    starts = range(0, len(seeds), plan.batch_size)
    parts = []
    with tqdm(total=plan.settings.steps * len(starts), unit="step", desc="sample", disable=launch.rank != 0) as bar:

        def generate_batch(batch: range) -> Pixels:
            labels = labels_of(batch, model.config).to(model.pos_embed.device)
            before = bar.n

            def progress(done: int, total: int) -> None:
                bar.update(before + done - bar.n)  # the steps of a batch may start again

            images = generate(model, labels, batch, plan.settings, progress, guide)
            if not images.isfinite().all():
                raise NonFiniteError(
                    f"{plan.reader.path}: the generated images contain NaN or Inf; try a smaller --cfg-scale than "
                    f"{plan.settings.cfg_scale:g} or an earlier checkpoint."
                )
            return to_uint8(decode(images))

        for start in starts:
            batch = seeds[start : start + plan.batch_size]
            parts.append(_raise_on_all_ranks(launch, partial(generate_batch, batch)))
    return np.concatenate(parts)


def write_images(plan: SamplingPlan, pixels: Pixels) -> None:
    """Write ``samples.npz`` and ``grid.png``; both files appear only once complete.

    Args:
        plan: the plan.
        pixels: uint8 [n, H, W, C], at least as many as the plan asks for.

    Raises:
        CheckpointError: a file cannot be written.
    """
    config = plan.reader.config
    pixels = pixels[: plan.num_images]
    labels = labels_of(range(plan.seed, plan.seed + plan.num_images), config).numpy()
    shown = pixels[:GRID_IMAGES]
    grid = make_grid(shown, grid_columns(len(shown), config.model.num_classes))
    writers: dict[str, Callable[[Path], Any]] = {
        "samples.npz": lambda path: np.savez(path, arr_0=pixels, arr_1=labels),
        "grid.png": lambda path: save_png(grid, path),
    }
    write_together(plan.out, writers)
    print(f"{len(pixels)} images in {plan.out / 'samples.npz'}, the first {len(shown)} in {plan.out / 'grid.png'}")


def _raise_on_all_ranks(launch: Launch, action: Callable[[], T]) -> T:
    """Run an action that may fail on a single rank; all ranks of the process group fail together."""
    return action() if launch.world == 1 else consensus.raise_on_all_ranks(torch.device("cpu"), action)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {path}: cannot create the directory: {error.strerror}.") from None
