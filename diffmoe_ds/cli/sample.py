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
  diffmoe sample --checkpoint runs/emoji-text --prompt "red apple" --prompt "blue car" --cfg-scale 3 --out samples
  diffmoe sample --checkpoint runs/T2I --geneval evaluation_metadata.jsonl --cfg-scale 3 --out samples
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
        "npz: samples.npz with arr_0, uint8 images [N, H, W, C], and arr_1, labels or numbers of prompts (default); "
        "png: a png folder with one file per image and labels.csv"
    )
    add("--format", choices=("npz", "png", "both"), help=text)
    text = (
        "prompts of GenEval's evaluation_metadata.jsonl, or a file like it; writes a geneval folder for its "
        "evaluate_images.py, with 4 images per prompt unless --per-prompt is given"
    )
    add("--geneval", type=nonempty_path, metavar="FILE", help=text)


def add_image_options(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the options that select the images to generate.

    Args:
        parser: the command's parser.
        default: number of images without ``--num-images`` and ``--per-class``, for the help text; both stay None.
    """
    add = parser.add_argument
    text = f"images to generate (default: {default:,}; of a text model, one per prompt)"
    add("--num-images", type=int, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="S", help="image k has seed S + k (default: %(default)s)")
    text = "classes to generate, as labels or names, separated by commas (default: all)"
    add("--classes", type=nonempty, metavar="A,B", help=text)
    text = "images per class or prompt, instead of --num-images"
    add("--per-class", "--per-prompt", type=int, metavar="N", help=text)
    text = (
        "cycle: image k has class k mod the number of classes (default); random: classes are drawn uniformly, as in "
        "ADM's sample files; the same for prompts"
    )
    add("--labels", choices=("cycle", "random"), default="cycle", help=text)
    add_prompt_options(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of text models."""
    add = parser.add_argument
    text = "prompt of a text model; repeat the option for several prompts"
    add("--prompt", action="append", metavar="TEXT", help=text)
    text = 'prompts, one per line; in a .jsonl file, one object {"prompt": TEXT} per line'
    add("--prompts", type=nonempty_path, metavar="FILE", help=text)
    text = "what guidance steers away from (default: the empty prompt)"
    add("--negative-prompt", metavar="TEXT", help=text)
    text = (
        "folder or hub ID of the text encoder, once per encoder; it must be the one the model was trained with "
        "(default: the folder or hub ID used in training)"
    )
    add("--text-encoder", type=nonempty, action="append", metavar="PATH|HUB_ID", help=text)


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
