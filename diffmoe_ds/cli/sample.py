"""``diffmoe sample``: generate images from a checkpoint, in one or more processes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe sample --checkpoint runs/fashion --out samples
  diffmoe sample --checkpoint runs/fashion --num-images 40 --steps 50 --sampler heun --cfg-scale 2 --out samples
  torchrun --nproc_per_node 2 -m diffmoe_ds.cli sample --checkpoint runs/fashion --out samples
  torchrun --nproc_per_node 8 -m diffmoe_ds.cli sample --checkpoint runs/L-E16 --experts sharded --out samples
"""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe sample``."""
    add = parser.add_argument
    text = "run directory (its newest checkpoint), checkpoint, or exported model"
    add("--checkpoint", type=Path, required=True, metavar="PATH", help=text)
    add("--num-images", type=int, default=40, metavar="N", help="images to generate (default: %(default)s)")
    text = "image i has seed S + i and class (S + i) mod classes (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="S", help=text)
    add("--steps", type=int, default=50, metavar="K", help="sampler steps (default: %(default)s; the paper uses 250)")
    text = "flow: euler (default) or heun; ddpm: ddpm (ancestral, default) or ddim"
    add("--sampler", metavar="NAME", help=text)
    text = "classifier-free guidance scale; 1 disables it (default: %(default)s)"
    add("--cfg-scale", type=float, default=1.0, metavar="G", help=text)
    text = "channels guided in ddpm models; the reference code guides the first 3 (default: %(default)s)"
    add("--guide-channels", type=_channels, default="all", metavar="all|C", help=text)
    text = (
        "how experts choose tokens (default: the first that the model supports). per_token decides for each token "
        "alone, so an image does not depend on its batch. With dynamic (the paper's rule) and static, the images of a "
        "batch compete in batch_pool models, so an image changes with --batch-size and with the number of ranks"
    )
    add("--routing", metavar="static|dynamic|per_token", help=text)
    add(
        "--vae",
        metavar="PATH|HUB_ID",
        help="directory or hub ID of the AutoencoderKL that decodes the latents of a latent model",
    )
    add("--weights", choices=("ema", "raw"), help="EMA or last weights (default: ema if present)")
    text = "images that a rank generates at once (default: %(default)s)"
    add("--batch-size", type=int, default=50, metavar="B", help=text)
    text = (
        "precision of the weights and activations (default: bf16 on GPUs that support it, fp32 elsewhere); the sampler "
        "always computes in fp32"
    )
    add("--dtype", choices=("fp32", "bf16"), help=text)
    text = (
        "with several ranks: gathered holds all experts on every rank (default); sharded splits them over the ranks, "
        "for models that do not fit on one GPU. The images are the same"
    )
    add("--experts", choices=("gathered", "sharded"), default="gathered", help=text)
    text = "output directory for samples.npz (arr_0: images, arr_1: labels) and grid.png"
    add("--out", type=Path, required=True, metavar="DIR", help=text)


def sample_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe sample``."""
    check_numbers(args)
    from diffmoe_ds.cli.sample_run import run_sampling  # imports torch

    run_sampling(args)


def check_numbers(args: argparse.Namespace) -> None:
    """Check what can be checked without the model.

    Raises:
        ConfigError: a number is out of range.
    """
    require_positive(args, "num_images", "batch_size", "steps")
    last_seed = 2**64 - 2 * args.num_images  # ranks may use further seeds to fill their shares
    if not 0 <= args.seed <= last_seed:
        raise ConfigError(f"--seed must be from 0 to {last_seed} with --num-images {args.num_images}, got {args.seed}.")
    if not (math.isfinite(args.cfg_scale) and args.cfg_scale >= 0):
        raise ConfigError(f"--cfg-scale must be a finite number of at least 0, got {args.cfg_scale}.")


def _channels(text: str) -> int | str:
    return text if text == "all" else int(text)
