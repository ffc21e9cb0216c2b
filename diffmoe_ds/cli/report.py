"""``diffmoe report``: an HTML page about a run, and its figures as PNG files."""

from __future__ import annotations

import argparse

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.cli.sample import add_prompt_options
from diffmoe_ds.cli.sampling_options import REPORT_CLASSES, add_sampling_options, check_sampling_numbers
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe report runs/demo --out report
  diffmoe report runs/demo --images 1000 --steps 50 --cfg-scale 2 --out report
  diffmoe report runs/L-E16 --checkpoint runs/L-E16/checkpoints/images_000001000000 --vae sd-vae --out report
  diffmoe report exported --classes 207,360,387 --out report
  diffmoe report runs/emoji --prompt "red apple" --prompt "blue car" --out report
"""
IMAGES = 200
"""Default of ``--images``: about a minute on two CPU cores for the model of the embedded recipe."""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe report``."""
    add = parser.add_argument
    text = "run directory; or a checkpoint or an exported model, for a report without curves"
    add("run_path", type=nonempty_path, metavar="RUN", help=text)
    add(
        "--out",
        type=nonempty_path,
        required=True,
        metavar="DIR",
        help="output directory for report.html and figures/*.png",
    )
    text = "checkpoint or exported model to generate from (default: the newest checkpoint of RUN)"
    add("--checkpoint", type=nonempty_path, metavar="PATH", help=text)
    text = "images for the routing figures; those for other guidance scales are extra (default: %(default)s)"
    add("--images", type=int, default=IMAGES, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="S", help="seed of the first image of each class (default: %(default)s)")
    text = "classes to generate, as labels or names, separated by commas (default: --num-classes, evenly spaced)"
    add("--classes", type=nonempty, metavar="A,B", help=text)
    text = (
        f"number of classes, or of captions of the run's dataset for a text model without --prompt (default: "
        f"{REPORT_CLASSES}, or fewer if there are fewer or --images is smaller)"
    )
    add("--num-classes", "--num-captions", type=int, metavar="M", help=text)
    add_prompt_options(parser)
    add_sampling_options(parser, cfg_scale=None)


def report_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe report``.

    Raises:
        DiffMoEError: an option is invalid, or the run cannot be read.
    """
    require_positive(args, "images", "num_classes")
    args.geneval = None  # an option of `diffmoe sample` alone
    check_sampling_numbers(args)
    last_seed = 2**64 - 1 - args.images
    if not 0 <= args.seed <= last_seed:
        raise ConfigError(f"--seed must be from 0 to {last_seed} with --images {args.images}, got {args.seed}.")
    from diffmoe_ds.cli.report_run import run_report  # imports torch

    run_report(args)
