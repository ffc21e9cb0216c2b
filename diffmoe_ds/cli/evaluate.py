"""``diffmoe evaluate``: compare images with a reference, in one or more processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.cli.sample import add_image_options
from diffmoe_ds.cli.sampling_options import add_sampling_options, check_sampling_numbers
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe evaluate --samples samples/samples.npz --reference 'data/test/*.tar'
  diffmoe evaluate --samples samples/samples.npz --reference photos --save-reference photos.npz
  diffmoe evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --extractor inception:weights.pth
  diffmoe evaluate --samples samples --clip openai/clip-vit-large-patch14 --retrieval training
  diffmoe evaluate --checkpoint runs/fashion --num-images 10000 --labels random --reference 'data/test/*.tar'
  diffmoe evaluate --checkpoint runs/emoji-text --prompts prompts.txt --reference 'data/test/*.tar'
  diffmoe evaluate --checkpoint runs/emoji-text --validation 'data/test/*.tar'
  torchrun --nproc_per_node 2 -m diffmoe_ds.cli evaluate --samples samples.npz --reference photos.npz --json
"""

NUM_IMAGES = 50_000
"""Default number of images to generate, as in published FIDs."""
OF_LOSS = ("batch_size", "dtype", "routing", "weights")
"""Generation options that the validation loss depends on."""


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe evaluate``."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    text = "images of the same size: .npz (arr_0: uint8 NHWC), folder, shards, or what diffmoe sample wrote to --out"
    which.add_argument("--samples", type=nonempty, metavar="NPZ|DIR|SHARDS", help=text)
    text = (
        "instead of --samples: generate the images from a run directory, checkpoint or exported model, without writing "
        "them to files; the options below are those of diffmoe sample"
    )
    which.add_argument("--checkpoint", type=nonempty_path, metavar="PATH", help=text)
    text = (
        "images (.npz, folder or shards) or statistics (.npz with mu and sigma, as published by ADM). Images in "
        "a folder are resized and cropped to the size of the samples; those in shards are padded if they are smaller, "
        "otherwise resized and cropped. Optional with --clip, --retrieval or --validation"
    )
    add("--reference", type=nonempty, metavar="NPZ|DIR|SHARDS", help=text)
    text = (
        "network whose features are compared: efficientnet-lite0 (default), inception:WEIGHTS_FILE (FID, sFID), "
        "dinov2:FOLDER, or module:Class"
    )
    add("--extractor", default="efficientnet-lite0", metavar="NAME", help=text)
    text = "save the statistics of the reference, and the features of up to 50,000 images, for use as --reference"
    add("--save-reference", type=nonempty_path, metavar="FILE.npz", help=text)
    text = (
        "CLIP score of images and their prompts: a folder with a CLIPModel of transformers, or its name on the hub, "
        "such as openai/clip-vit-large-patch14"
    )
    add("--clip", type=nonempty, metavar="PATH|HUB_ID", help=text)
    text = (
        "retrieval precision: how often the nearest image in this captioned dataset has the prompt of the "
        "generated one as a caption; images are compared by the features of --extractor"
    )
    add("--retrieval", type=nonempty, metavar="DIR|SHARDS", help=text)
    text = (
        "with --checkpoint: also compute the training loss on these held-out images or prepared latents, with fixed "
        "noise and times"
    )
    add("--validation", type=nonempty, metavar="DIR|SHARDS", help=text)
    add("--json", action="store_true", help="print one JSON object")
    _add_generation_options(parser)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser, default=NUM_IMAGES)
    add_sampling_options(parser)


def evaluate_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe evaluate``."""
    require_positive(args, "num_images", "per_class", "batch_size")
    if args.save_reference is not None and args.save_reference.suffix != ".npz":
        raise ConfigError(f"--save-reference must end in .npz, got {args.save_reference}.")
    if args.checkpoint is None and args.validation is not None:
        raise ConfigError("--validation needs --checkpoint: computing the loss needs the model.")
    has_images = any(value is not None for value in (args.reference, args.clip, args.retrieval))
    if not has_images and args.validation is None:
        raise ConfigError("--reference is missing; it is optional with --clip, --retrieval or --validation.")
    if args.save_reference is not None and args.reference is None:
        raise ConfigError(f"--save-reference {args.save_reference} needs --reference.")
    if args.checkpoint is None:
        _refuse_options(args, "needs --checkpoint; --samples are already generated.", allowed=("batch_size",))
    elif not has_images:
        _refuse_options(
            args, "needs --reference, --clip or --retrieval; without it, no images are generated.", allowed=OF_LOSS
        )
    else:
        check_sampling_numbers(args)
        if all(getattr(args, name) is None for name in ("num_images", "per_class", "prompt", "prompts")):
            args.num_images = NUM_IMAGES
        # Options that only `diffmoe sample` has: experts are not sharded, and nothing is written.
        args.experts, args.out, args.format, args.geneval = "gathered", Path(), None, None
    if not has_images:
        from diffmoe_ds.cli.evaluate_loss import run_loss  # imports torch

        run_loss(args)
        return
    from diffmoe_ds.cli.evaluate_run import run_evaluation  # imports torch

    run_evaluation(args)


def _refuse_options(args: argparse.Namespace, why: str, allowed: Sequence[str]) -> None:
    """Check that no generation option is passed that would have no effect.

    Args:
        args: of the command.
        why: end of the error's sentence.
        allowed: names of those that have an effect.

    Raises:
        ConfigError: one is passed.
    """
    parser = argparse.ArgumentParser(add_help=False)
    _add_generation_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        if name not in allowed and getattr(args, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} {why}")
