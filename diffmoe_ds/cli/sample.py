"""``diffmoe sample``: generate images from a checkpoint, in one or more processes."""

from __future__ import annotations

import argparse

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.cli.sampling_options import NUM_IMAGES, add_sampling_options, check_sampling_numbers

EXAMPLES = """examples:
  diffmoe sample --checkpoint runs/fashion --out samples
  diffmoe sample --checkpoint runs/fashion --num-images 40 --steps 50 --sampler heun --cfg-scale 2 --out samples
  diffmoe sample --checkpoint runs/fashion --classes sneaker,bag --per-class 8 --format both --out samples
  diffmoe sample --checkpoint runs/fashion --capacity 0.5 --out samples
  torchrun --nproc_per_node 2 -m diffmoe_ds.cli sample --checkpoint runs/fashion --out samples
  torchrun --nproc_per_node 8 -m diffmoe_ds.cli sample --checkpoint runs/L-E16 --experts sharded --out samples
"""


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe sample``."""
    add = parser.add_argument
    text = "run directory (its newest checkpoint), checkpoint, or exported model"
    add("--checkpoint", type=nonempty_path, required=True, metavar="PATH", help=text)
    add_image_options(parser, default=NUM_IMAGES)
    add_sampling_options(parser)
    text = (
        "with several ranks: gathered holds all experts on every rank (default); sharded splits them over the ranks, "
        "for models that do not fit on one GPU. The images are the same"
    )
    add("--experts", choices=("gathered", "sharded"), default="gathered", help=text)
    text = (
        "output directory for the images and grid.png, on a file system that all ranks share; the same command "
        "resumes an interrupted run"
    )
    add("--out", type=nonempty_path, required=True, metavar="DIR", help=text)
    text = (
        "npz: samples.npz with arr_0, uint8 images [N, H, W, C], and arr_1, labels (default); png: a png folder with "
        "one file per image and labels.csv"
    )
    add("--format", choices=("npz", "png", "both"), default="npz", help=text)


def add_image_options(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the options that select the images to generate.

    Args:
        parser: the command's parser.
        default: number of images without ``--num-images`` and ``--per-class``, for the help text; both stay None.
    """
    add = parser.add_argument
    add("--num-images", type=int, metavar="N", help=f"images to generate (default: {default:,})")
    add("--seed", type=int, default=0, metavar="S", help="image k has seed S + k (default: %(default)s)")
    text = "classes to generate, as labels or names, separated by commas (default: all)"
    add("--classes", type=nonempty, metavar="A,B", help=text)
    add("--per-class", type=int, metavar="N", help="images per class, instead of --num-images")
    text = (
        "cycle: image k has class k mod the number of classes (default); random: classes are drawn uniformly, as in "
        "ADM's sample files"
    )
    add("--labels", choices=("cycle", "random"), default="cycle", help=text)


def sample_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe sample``."""
    check_numbers(args)
    from diffmoe_ds.cli.sample_run import run_sampling  # imports torch

    run_sampling(args)


def check_numbers(args: argparse.Namespace) -> None:
    """Check the values that can be checked without the model.

    Raises:
        ConfigError: a number is out of range.
    """
    require_positive(args, "num_images", "per_class")
    check_sampling_numbers(args)
