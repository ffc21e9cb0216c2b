"""``diffmoe init``: look at images and write a recipe that fits them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import expand_user, write_text
from diffmoe_ds.text import counted

if TYPE_CHECKING:
    from diffmoe_ds.cli.init_recipe import Facts, Initial
    from diffmoe_ds.config.schema import Config
    from diffmoe_ds.data.survey import Survey

EXAMPLES = """examples:
  diffmoe init photographs --size 64
  diffmoe init photographs --size 256 --vae sd-vae-ft-ema --out photographs-256.yaml
  diffmoe init photographs --size 64 --text-encoder minilm --out captioned.yaml
  diffmoe init 'shards-{000..127}.tar'
  diffmoe init photographs --init-from runs/pets --out tuned.yaml
"""
SIZES = (32, 64)
"""Default sizes of pixel models: the largest that the smallest image has, or else the first."""
MULTIPLE = 8
"""Divisor of ``--size``, so that an image has whole tokens."""


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe init``."""
    add = parser.add_argument
    text = "folder with one folder of images per class, folder of images without classes, or shards"
    add("images", type=nonempty, metavar="IMAGES", help=text)
    text = f"height and width in pixels, a multiple of {MULTIPLE} (default: {SIZES[1]}, or {SIZES[0]} for small images)"
    add("--size", type=int, metavar="N", help=text)
    text = "directory or hub ID of an AutoencoderKL: train on its latents instead of pixels"
    add("--vae", type=nonempty, metavar="PATH|HUB_ID", help=text)
    text = "model to fine-tune: an exported model, a checkpoint or a run directory; sets the size and the channels"
    add("--init-from", type=nonempty, metavar="PATH", help=text)
    text = "train on captions next to the images, encoded by this text encoder, instead of classes"
    add("--text-encoder", type=nonempty, metavar="PATH|HUB_ID|minilm", help=text)
    add("--out", type=nonempty_path, metavar="FILE.yaml", help="the recipe (default: the name of IMAGES)")


def init_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe init``.

    Raises:
        DiffMoEError: an option is invalid, there are no images, or the recipe exists or cannot be written.
    """
    out = args.out or Path(f"{_name(args.images)}.yaml")
    if out.suffix != ".yaml":
        raise ConfigError(f"--out {out}: a recipe must end in .yaml.")
    if out.exists():
        raise ConfigError(f"{out} exists already; edit it, remove it, or pass another --out.")
    if args.size is not None and (args.size < MULTIPLE or args.size % MULTIPLE):
        raise ConfigError(f"--size must be a positive multiple of {MULTIPLE}, got {args.size}.")
    require_positive(args, "size")
    if args.text_encoder is not None and args.init_from is not None:
        raise ConfigError("--text-encoder and --init-from cannot be combined: a fine-tuned model keeps its conditions.")

    from diffmoe_ds.cli.init_recipe import draft
    from diffmoe_ds.data.survey import survey

    found = survey(args.images)
    facts = _facts(args, out, found)
    write_text(out, draft(facts))
    too_many = _warn(out, found, facts)
    first = "repair or remove unreadable images, or raise data.max_unreadable; then " if too_many else ""
    print(f"{'images':>11}  {facts.title}\n{'recipe':>11}  {out}\n{'next':>11}  {first}diffmoe train --config {out}")


def _warn(out: Path, found: Survey, facts: Facts) -> bool:
    """Print what is lost of the images, and return whether so many are unreadable that training will stop."""
    if facts.initial is not None and facts.channels == 1 and not found.is_gray:
        print(f"{'warning':>11}  the model of --init-from is grayscale: the images lose their color", file=sys.stderr)
    if found.unsupported:
        endings = ", ".join(sorted(found.unsupported))
        files = counted(sum(found.unsupported.values()), "file")
        print(f"{'warning':>11}  {files} ({endings}) cannot be read and are left out; convert them", file=sys.stderr)
    for problem in found.unreadable[:3]:
        print(f"{'warning':>11}  {problem}", file=sys.stderr)
    limit = DataConfig().max_unreadable
    if found.unreadable:
        print(
            f"{'':>11}  {len(found.unreadable)} of the {counted(found.looked_at, 'image')} that were read; training "
            f"replaces unreadable images, and stops if they are more than {limit:.0%} of all (data.max_unreadable); "
            f"`diffmoe train --config {out} --dry-run --thorough` names them all",
            file=sys.stderr,
        )
    return len(found.unreadable) > limit * found.looked_at


def _name(images: str) -> str:
    """Return a name for the recipe and the run: that of the folder, or ``images``."""
    name = Path(os.path.abspath(expand_user(images))).name if expand_user(images).is_dir() else ""
    return name if name and all(c.isalnum() or c in "-_." for c in name) else "images"


def _facts(args: argparse.Namespace, out: Path, found: Survey) -> Facts:
    """Combine the options with what the images contain.

    Raises:
        ConfigError: an option contradicts the images.
    """
    import torch

    from diffmoe_ds.checkpoint.export import require_weights
    from diffmoe_ds.cli.init_recipe import Facts
    from diffmoe_ds.data.sources.remote import is_url

    initial = None if args.init_from is None else require_weights(Path(args.init_from), "--init-from")
    channels, size = _input(args, found) if initial is None else _input_of(args, found, initial.config)
    gpu = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
    local = not is_url(args.images)
    return Facts(
        path=os.path.abspath(expand_user(args.images)) if local else args.images,
        title=_title(found),
        num_images=found.num_images,
        num_classes=found.num_classes,
        class_names=found.class_names or (),
        channels=channels,
        size=size,
        vae=None if args.vae is None else _place(args.vae),
        gpu_gb=gpu,
        file=str(out),
        initial=None if initial is None else _initial(args.init_from, initial.config),
        text_encoder=None if args.text_encoder is None else _place(args.text_encoder),
    )


def _place(model: str) -> str:
    """Return a folder as an absolute path, and a hub ID as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _initial(path: str, config: Config) -> Initial:
    from diffmoe_ds.cli.init_recipe import Initial

    return Initial(os.path.abspath(path), config.model_name, config.objective.kind, config.model.label_dropout > 0)


def _input_of(args: argparse.Namespace, found: Survey, config: Config) -> tuple[int, int]:
    """Return channels and size of the input of a model to fine-tune.

    Raises:
        ConfigError: the images or the options do not fit the model.
    """
    from diffmoe_ds.sampling.generate import PIXEL_CHANNELS

    channels, size = config.model.in_channels, config.model.input_size
    pixels = size
    if args.vae is not None:
        from diffmoe_ds.data.vae import downsampling, vae_settings

        pixels *= downsampling(vae_settings(args.vae))
    if args.size is not None and args.size != pixels:
        raise ConfigError(
            f"--size {args.size}: the model of --init-from {args.init_from} is for {pixels} pixels; omit it."
        )
    is_latent = args.vae is not None or found.latent_shape is not None
    if channels not in PIXEL_CHANNELS and not is_latent:
        raise ConfigError(
            f"--init-from {args.init_from}: the model generates latents ({channels} channels); pass --vae, or prepare "
            "latents with `diffmoe prepare latents`."
        )
    return channels, size


def _input(args: argparse.Namespace, found: Survey) -> tuple[int, int]:
    """Return channels and size of the model's input."""
    if found.latent_shape is not None:
        for name in ("size", "vae"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} {getattr(args, name)}: {args.images} holds latents; omit it.")
        return found.latent_shape[0], found.latent_shape[1]
    if args.vae is not None:
        from diffmoe_ds.data.vae import downsampling, vae_settings

        settings = vae_settings(args.vae)
        factor = downsampling(settings)
        pixels = args.size or 256
        if pixels % (MULTIPLE * factor):
            raise ConfigError(f"--size must be a multiple of {MULTIPLE * factor} with this VAE, got {pixels}.")
        return int(settings["latent_channels"]), pixels // factor
    default = SIZES[1] if found.smallest >= SIZES[1] else SIZES[0]
    if not found.is_folder:  # shards are not resized
        default = -(-found.largest // MULTIPLE) * MULTIPLE
        if args.size is not None and args.size < found.largest:
            raise ConfigError(
                f"--size {args.size}: the images in {args.images} have up to {found.largest} pixels, and images in "
                "shards are not resized; use at least that, or `diffmoe prepare images`."
            )
    return 1 if found.is_gray else 3, args.size or default


def _title(found: Survey) -> str:
    """Return one line about the images."""
    parts = [counted(found.num_images, "image")]
    if found.num_classes > 1:
        parts[0] += f" in {found.num_classes:,} classes"
    if found.latent_shape is not None:
        return f"{parts[0]}, latents of {'x'.join(map(str, found.latent_shape))}"
    same = found.smallest == found.largest
    parts.append(f"{found.smallest:,} pixels" if same else f"{found.smallest:,} to {found.largest:,} pixels")
    return ", ".join([*parts, "grayscale" if found.is_gray else "color"])
