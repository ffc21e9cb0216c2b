"""`diffmoe prepare`: convert images and captions to shards, in one or more processes, and verify a dataset."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.config.fields import MAX_CACHE_GB
from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.data.prepare.preparation import Preparation, begin
from diffmoe_ds.data.prepare.run import run
from diffmoe_ds.distributed.launch import Launch, local_device, resolve_launch
from diffmoe_ds.errors import AlreadyReportedError, ConfigError, DataError, DiffMoEError
from diffmoe_ds.files import expand_user

if TYPE_CHECKING:
    from diffmoe_ds.data.prepare.encoders import Encoder
    from diffmoe_ds.data.prepare.text import CaptionEncoder
    from diffmoe_ds.data.sources.folder import Source

REPORT_TIME = 3.0
"""Seconds that the other ranks of a host wait before they exit with an error that all of them hit.

Only local rank 0 reports it, and torchrun would terminate it as soon as another rank exits."""
EXAMPLES = """examples:
  diffmoe prepare latents --images imagenet/train --vae sd-vae-ft-ema --size 256 --out latents
  torchrun --nproc_per_node 8 -m diffmoe_ds.cli prepare latents --images 'raw/shards-{000..127}.tar' \\
      --vae stabilityai/sd-vae-ft-ema --size 256 --out latents
  diffmoe prepare images --images photographs --size 64 --out shards
  diffmoe prepare text --images latents --captions captions.csv --encoder google/flan-t5-base --out text
  diffmoe prepare check latents
"""


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffmoe prepare`."""
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="latents|images|text|check")
    latents = kinds.add_parser("latents", help="encode images with a VAE", description="Encode images with a VAE.")
    images = kinds.add_parser("images", help="crop images", description="Crop images and write them to shards as PNG.")
    text = kinds.add_parser(
        "text",
        help="encode captions with text encoders",
        description="Encode captions with one or more text encoders, and write them to shards with their images.",
    )
    check = kinds.add_parser(
        "check",
        help="verify a dataset",
        description="Report what is damaged or missing.",
    )
    for sub in (latents, images):
        _add_source(sub)
        sub.add_argument("--size", type=int, default=256, help="height and width in pixels (default: %(default)s)")
    latents.add_argument(
        "--vae", type=nonempty, required=True, metavar="PATH|HUB_ID", help="directory or hub ID of an AutoencoderKL"
    )
    latents.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default: %(default)s")
    for sub in (latents, images):
        sub.add_argument(
            "--features",
            type=nonempty,
            metavar="efficientnet-lite0|PATH|HUB_ID",
            help="also store the spatial tokens of a frozen network for each image and its mirror image, for REPA: "
            "efficientnet-lite0, or the directory or hub ID of a DINOv2",
        )
        sub.add_argument(
            "--batch-size",
            type=int,
            default=32,
            metavar="B",
            help="images per batch of a network (default: %(default)s)",
        )
    _add_source(text)
    _add_text(text)
    for sub in (latents, images, text):
        add_output_arguments(sub)
    check.add_argument("path", type=nonempty_path, metavar="DIR", help="directory of shards, or one shard")
    check.add_argument("--json", action="store_true", help="print one JSON object")


def prepare_command(args: argparse.Namespace) -> None:
    """Run `diffmoe prepare`."""
    if args.kind == "check":
        _check(args)
        return
    prepare(args, _preparation)


def prepare(args: argparse.Namespace, make: Callable[[argparse.Namespace, Launch], Preparation]) -> None:
    """Write this rank's shards of a dataset.

    Args:
        args: has the options of `add_output_arguments`.
        make: returns the preparation for the arguments and this rank's launch.

    Raises:
        DiffMoEError: an option is invalid, the images cannot be read, or the shards cannot be written.
    """
    require_positive(args, "size", "tokens", "batch_size", "shard_images", "threads", "timeout")
    if not 0 < getattr(args, "cache_gb", 1.0) <= MAX_CACHE_GB:  # also refuses NaN
        raise ConfigError(f"--cache-gb must be positive and at most {MAX_CACHE_GB:g}, got {args.cache_gb:g}.")
    if not 0 <= args.max_unreadable <= 1:
        raise ConfigError(f"--max-unreadable must be between 0 and 1, got {args.max_unreadable}.")
    launch = resolve_launch()
    # The number of threads may change the last bits of a latent, and launchers set it differently.  To use more
    # cores, start more ranks.
    torch.set_num_threads(1)
    try:
        preparation = make(args, launch)
        begin(preparation)
    except DiffMoEError as error:
        if launch.local_rank == 0:
            raise
        time.sleep(REPORT_TIME)
        raise AlreadyReportedError(error.exit_code) from None
    run(preparation, launch.rank, launch.world, args.timeout)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=nonempty,
        required=True,
        metavar="DIR|SHARDS",
        help="DIR/CLASS/*.jpg, DIR/*.jpg (no labels), or WebDataset shards such as 'shards-{000..127}.tar'",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="read all images in DIR, at any depth, or in SHARDS, without labels",
    )
    parser.add_argument(
        "--cache-dir", type=nonempty, metavar="DIR", help="cache for remote shards (default: ~/.cache/diffmoe-ds)"
    )
    parser.add_argument(
        "--cache-gb",
        type=float,
        default=DataConfig().cache_gb,
        metavar="GB",
        help="size limit of the cache; it must hold all shards (default: %(default)s)",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--encoder",
        type=nonempty,
        required=True,
        action="append",
        metavar="PATH|HUB_ID|minilm",
        help="directory or hub ID of a text encoder, or minilm, which the extra `text` installs; repeat the option to "
        "combine several",
    )
    add(
        "--captions",
        type=nonempty_path,
        metavar="FILE",
        help="CSV or JSONL file with columns file_name and caption (default: .txt or .json next to each image, or in "
        "the shards)",
    )
    add(
        "--tokens",
        type=int,
        metavar="L",
        help="maximum tokens per caption; longer ones are truncated (default: 77 for CLIP and 128 for others, or the "
        "encoder's limit if it is lower)",
    )
    add("--size", type=int, help="crop images to this height and width (default: store them as they are)")
    add("--batch-size", type=int, default=32, metavar="B", help="captions per batch (default: %(default)s)")


def add_output_arguments(parser: argparse.ArgumentParser, out: Path | None = None) -> None:
    """Add the options of every preparation.

    Args:
        parser: the command's parser.
        out: the default output directory; without one, `--out` is required.
    """
    add = parser.add_argument
    add(
        "--out",
        type=nonempty_path,
        required=out is None,
        default=out,
        metavar="DIR",
        help="output directory of the shards",
    )
    add("--shard-images", type=int, default=4096, metavar="N", help="images per shard (default: %(default)s)")
    add(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="fraction of the images that may be unreadable; they are skipped and listed in report.json "
        "(default: %(default)s)",
    )
    add("--threads", type=int, default=2, metavar="N", help="decoding threads per rank (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="give up when no other rank finishes a shard within this time (default: %(default)s)",
    )


def _preparation(args: argparse.Namespace, launch: Launch) -> Preparation:
    # Imported lazily so that typos fail fast: diffusers takes seconds to import.
    from diffmoe_ds.data.captions import captions_beside
    from diffmoe_ds.data.dataset import open_source
    from diffmoe_ds.data.sources.cache import shard_cache
    from diffmoe_ds.data.sources.shards import ShardDataset

    inside = expand_user(args.images)
    out = Path(os.path.realpath(args.out))  # unlike resolve(), it accepts a link to itself
    if inside.is_dir() and inside.resolve() in (out, *out.parents):
        raise ConfigError(f"--out {args.out} is inside --images {args.images}; choose a directory outside.")
    cache = shard_cache(DataConfig(cache_dir=args.cache_dir, cache_gb=args.cache_gb))
    source = open_source(args.images, args.unlabelled, cache)
    remote = source.remote_bytes() if isinstance(source, ShardDataset) else 0
    if remote > args.cache_gb * 1e9:
        raise ConfigError(
            f"--cache-gb is {args.cache_gb:g}, but preparation mixes the images of all shards, {remote / 1e9:.3g} GB "
            "of downloads; increase it."
        )
    texts = None if args.kind == "text" else partial(captions_beside, source)
    encoder = _caption_encoder(args, launch, source) if args.kind == "text" else _image_encoder(args, launch)
    return Preparation(source, encoder, args.out, args.shard_images, args.max_unreadable, texts)


def _image_encoder(args: argparse.Namespace, launch: Launch) -> Encoder:
    from diffmoe_ds.data.prepare.encoders import LatentEncoder, PixelEncoder

    images: PixelEncoder | LatentEncoder
    device = local_device(launch)
    if args.kind == "images":
        images = PixelEncoder(args.size, args.threads)
    else:
        from diffmoe_ds.data.vae import VAE

        images = LatentEncoder(VAE(args.vae, device), args.size, args.dtype, args.batch_size, args.threads)
    if args.features is None:
        return images
    from diffmoe_ds.data.feature_network import FeatureNetwork
    from diffmoe_ds.data.prepare.features import FeatureEncoder

    return FeatureEncoder(images, FeatureNetwork(args.features, device), args.batch_size)


def _caption_encoder(args: argparse.Namespace, launch: Launch, source: Source) -> CaptionEncoder:
    from diffmoe_ds.data.captions import open_captions
    from diffmoe_ds.data.prepare.encoders import PixelEncoder, StoredEncoder
    from diffmoe_ds.data.prepare.text import CaptionEncoder
    from diffmoe_ds.data.sources.shards import ShardDataset
    from diffmoe_ds.data.text_encoder import TextEncoders

    latents = source.latents if isinstance(source, ShardDataset) else None
    if latents is not None and args.size is not None:
        raise ConfigError(f"--size is {args.size}, but --images {args.images} holds latents; remove --size.")
    images = StoredEncoder(source, args.threads) if args.size is None else PixelEncoder(args.size, args.threads)
    captions = open_captions(source, None if args.captions is None else str(args.captions))
    encoders = TextEncoders(args.encoder, local_device(launch), args.tokens)
    return CaptionEncoder(images, captions, args.captions, encoders, args.batch_size)


def _check(args: argparse.Namespace) -> None:
    from diffmoe_ds.data.prepare.verify import check_set, report_lines

    with tqdm(unit="shard", desc="check", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check_set(args.path, progress)
    print(json.dumps(report) if args.json else report_lines(report))
    problems = report["problems"]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DataError(f"{args.path} is damaged or incomplete: {problems[0]}{more}")
