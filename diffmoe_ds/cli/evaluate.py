"""``diffmoe evaluate``: compare images with a reference, in one or more processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe evaluate --samples samples/samples.npz --reference 'data/test/*.tar'
  diffmoe evaluate --samples samples/samples.npz --reference photos --save-reference photos.npz
  diffmoe evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --extractor inception:weights.pth
  torchrun --nproc_per_node 2 -m diffmoe_ds.cli evaluate --samples samples.npz --reference photos.npz --json
"""


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe evaluate``."""
    add = parser.add_argument
    add("--samples", required=True, metavar="NPZ|DIR", help="images: .npz (arr_0: uint8 NHWC) or a folder")
    text = (
        "images (.npz, folder or shards) or statistics (.npz with mu and sigma, as ADM publishes). Images of a folder "
        "are resized and cropped to the size of the samples, those of shards padded, as in training"
    )
    add("--reference", required=True, metavar="NPZ|DIR|SHARDS", help=text)
    text = (
        "network whose features are compared: efficientnet-lite0 (default), inception:WEIGHTS_FILE (FID, sFID), "
        "dinov2:FOLDER, or module:Class"
    )
    add("--extractor", default="efficientnet-lite0", metavar="NAME", help=text)
    text = "write the statistics of the reference, and up to 50,000 features, to reuse as --reference"
    add("--save-reference", type=Path, metavar="FILE.npz", help=text)
    text = "images that a rank evaluates at once (default: %(default)s)"
    add("--batch-size", type=int, default=50, metavar="B", help=text)
    add("--json", action="store_true", help="print one JSON object")


def evaluate_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe evaluate``."""
    require_positive(args, "batch_size")
    if args.save_reference is not None and args.save_reference.suffix != ".npz":
        raise ConfigError(f"--save-reference must end in .npz, got {args.save_reference}.")
    from diffmoe_ds.cli.evaluate_run import run_evaluation  # imports torch

    run_evaluation(args)
