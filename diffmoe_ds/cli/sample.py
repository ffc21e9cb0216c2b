"""``diffmoe sample``: images from a checkpoint, on one process or many."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from diffmoe_ds.checkpoint.export import WEIGHTS, open_weights
from diffmoe_ds.checkpoint.load import best_kind, restore_weights
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed.launch import Launch, local_device, resolve_launch
from diffmoe_ds.distributed.rendezvous import join_ranks
from diffmoe_ds.errors import CheckpointError, ConfigError, NonFiniteError
from diffmoe_ds.files import write_together
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.generate import (
    PIXEL_CHANNELS,
    check_guidance,
    draw,
    grid_columns,
    make_grid,
    save_png,
    to_uint8,
)
from diffmoe_ds.sampling.samplers import SAMPLERS, check_sampling
from diffmoe_ds.topology import Topology

GRID_IMAGES = 100
"""Images shown in grid.png at most."""
EXAMPLES = """examples:
  diffmoe sample --checkpoint runs/fashion --out samples
  diffmoe sample --checkpoint runs/fashion --num-images 40 --steps 50 --sampler heun --cfg-scale 2 --out samples
  torchrun --nproc_per_node 2 -m diffmoe_ds.cli sample --checkpoint runs/fashion --out samples
"""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffmoe sample``."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="run directory, one of its checkpoints, or an export",
    )
    add("--num-images", type=int, default=40, metavar="N", help="how many (default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="image i is that of seed S + i, and of class (S + i) mod classes (default: %(default)s)",
    )
    add("--steps", type=int, default=50, metavar="K", help="sampler steps (default: %(default)s; the paper takes 250)")
    add("--sampler", metavar="NAME", help="flow: euler (default) or heun; ddpm: ddpm (ancestral, default) or ddim")
    add("--cfg-scale", type=float, default=1.0, metavar="G", help="guidance; 1 is none (default: %(default)s)")
    add(
        "--guide-channels",
        type=lambda text: text if text == "all" else int(text),
        default="all",
        metavar="all|C",
        help="channels that guidance of a ddpm model acts on; the reference takes 3 (default: %(default)s)",
    )
    add(
        "--routing",
        metavar="static|dynamic|per_token",
        help="how experts choose tokens; default: the best that the model can do.  per_token decides for each token "
        "alone, so an image does not depend on its batch.  dynamic (the paper's) and static of a batch_pool model let "
        "the images of a batch compete, so an image changes with --batch-size and with the number of ranks",
    )
    add("--vae", metavar="PATH|HUB_ID", help="the AutoencoderKL that turns the latents of a latent model into pixels")
    add("--weights", choices=tuple(WEIGHTS), help="averaged or last weights (default: ema, if there)")
    add("--batch-size", type=int, default=50, metavar="B", help="images drawn at once by a rank (default: %(default)s)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets samples.npz (arr_0, arr_1: images, labels), grid.png",
    )


def sample_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe sample``."""
    for option in ("num_images", "batch_size", "steps"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(args, option)}, but it must be above 0.")
    if not 0 <= args.seed <= 2**64 - 2 * args.num_images:
        raise ConfigError(f"--seed is {args.seed}, but it and the seeds of all images must be from 0 to below 2^64.")
    if not (math.isfinite(args.cfg_scale) and args.cfg_scale >= 0):
        raise ConfigError(f"--cfg-scale is {args.cfg_scale}, but it must be a number that is not negative.")
    launch = resolve_launch()
    reader = open_weights(args.checkpoint)
    if reader is None:
        raise CheckpointError(
            f"--checkpoint {args.checkpoint}: is no checkpoint, no run directory with one and no exported model."
        )
    config = reader.config
    if (config.model.in_channels in PIXEL_CHANNELS) == (args.vae is not None):
        raise ConfigError(
            f"{reader.path}: the model draws {config.model.in_channels} channels, "
            + (
                "which are pixels already; leave --vae out."
                if args.vae
                else "latents, which need a --vae to be pixels."
            )
        )
    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise ConfigError(unknown("--sampler", args.sampler, SAMPLERS))
    sampler = args.sampler or make_objective(config.objective.kind).samplers[0]
    check_sampling(config.objective.kind, sampler, args.steps)
    check_guidance(args.cfg_scale, args.guide_channels, config)
    model = DiT(config)
    kind = best_kind(reader) if args.weights is None else WEIGHTS[args.weights]
    restore_weights(model, reader, Topology(0, 1, 1, config.num_experts), kind)
    model.set_inference(args.routing or config.inference_choices[0])
    device = local_device(launch)
    model.to(device).eval()
    decode = _decoder(args.vae, config.model.in_channels, device)
    rendezvous = join_ranks(launch, f"{reader.path} {sampler}")
    rendezvous.on_main("out", lambda: _make_folder(args.out))
    if launch.world > 1:
        if launch.rank == 0:
            print(f"{'launch':>11}  {rendezvous.launch.describe()}", flush=True)
        dist.init_process_group("gloo")
    pixels = _draw_share(model, args, launch, device, sampler, decode)
    pixels = _gather(pixels, args.num_images, launch)
    if pixels is None:
        return
    labels = np.array([_label(args.seed + i, model) for i in range(args.num_images)], dtype=np.int64)
    shown = pixels[:GRID_IMAGES]
    grid = make_grid(shown, grid_columns(len(shown), config.model.num_classes))
    write_together(
        args.out,
        {
            "samples.npz": lambda path: np.savez(path, arr_0=pixels, arr_1=labels),
            "grid.png": lambda path: save_png(grid, str(path), scale=max(1, math.ceil(600 / grid.shape[1]))),
        },
    )
    print(f"{args.num_images} images in {args.out / 'samples.npz'}, the first {len(shown)} in {args.out / 'grid.png'}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {path}: cannot be made: {error.strerror}.") from None


def _label(seed: int, model: DiT) -> int:
    return seed % model.config.model.num_classes


def _decoder(vae: str | None, channels: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """From what the model draws to pixels in about [-1, 1]."""
    if vae is None:
        return lambda pixels: pixels
    from diffmoe_ds.data.vae import VAE  # imports diffusers, an extra

    loaded = VAE(vae, device)
    if loaded.settings["latent_channels"] != channels:
        raise ConfigError(
            f"--vae {vae}: decodes latents of {loaded.settings['latent_channels']} channels, but the model draws "
            f"{channels}."
        )
    return loaded.decode


def _draw_share(
    model: DiT,
    args: argparse.Namespace,
    launch: Launch,
    device: torch.device,
    sampler: str,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> np.ndarray:
    """This rank's images, an equal and contiguous share of all; uint8 [n, H, W, C], padded with further seeds."""
    share = math.ceil(args.num_images / launch.world)
    seeds = range(args.seed + launch.rank * share, args.seed + (launch.rank + 1) * share)
    drawn = []
    steps = args.steps * math.ceil(share / args.batch_size)
    with tqdm(total=steps, unit="step", desc="sample", disable=launch.rank != 0) as bar:
        for first in range(0, share, args.batch_size):
            batch = seeds[first : first + args.batch_size]
            labels = torch.tensor([_label(seed, model) for seed in batch], device=device)
            images = draw(
                model,
                labels,
                batch,
                sampler=sampler,
                steps=args.steps,
                cfg_scale=args.cfg_scale,
                guide_channels=args.guide_channels,
                progress=lambda done, total: bar.update(),
            )
            if not images.isfinite().all():
                raise NonFiniteError(
                    f"{args.checkpoint}: the images are no numbers; a smaller --cfg-scale than {args.cfg_scale:g} or "
                    "another checkpoint may help."
                )
            drawn.append(to_uint8(decode(images)))
    return np.concatenate(drawn)


def _gather(pixels: np.ndarray, num_images: int, launch: Launch) -> np.ndarray | None:
    """All images on rank 0, none on the others."""
    if launch.world == 1:
        return pixels[:num_images]
    mine = torch.from_numpy(pixels)
    every = [torch.empty_like(mine) for _ in range(launch.world)] if launch.rank == 0 else None
    dist.gather(mine, every)
    dist.destroy_process_group()
    return None if every is None else torch.cat(every).numpy()[:num_images]
