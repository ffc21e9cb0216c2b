"""``diffmoe sample``: generate images from a checkpoint, in one or more processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.cli.sampling_options import add_sampling_options, check_sampling_numbers
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
    add_sampling_options(parser)
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
    require_positive(args, "num_images")
    check_sampling_numbers(args)
    last_seed = 2**64 - 2 * args.num_images  # ranks may use further seeds to fill their shares
    if not 0 <= args.seed <= last_seed:
        raise ConfigError(f"--seed must be from 0 to {last_seed} with --num-images {args.num_images}, got {args.seed}.")
