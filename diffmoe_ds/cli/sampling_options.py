"""Options that control how images are generated, shared by all commands that generate them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe_ds.cli.arguments import nonempty, nonempty_path, require_positive
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from diffmoe_ds.checkpoint.load import WeightsReader
    from diffmoe_ds.config.schema import Config
    from diffmoe_ds.sampling.generate import SamplingSettings


NUM_IMAGES = 40
"""Default of ``diffmoe sample --num-images``."""
REPORT_CLASSES = 10
"""Default of `report`'s ``--num-classes``, unless the model has fewer classes or --images is smaller."""


def add_sampling_options(parser: argparse.ArgumentParser, cfg_scale: float | None = 1.0) -> None:
    """Add the options for the sampler, guidance, precision and routing.

    Args:
        parser: the command's parser.
        cfg_scale: default of ``--cfg-scale``; None uses the run's ``sample.cfg_scale``.
    """
    _add_sampler_options(parser)
    _add_guidance_options(parser, cfg_scale)
    add = parser.add_argument
    text = (
        "how experts choose tokens (default: the model's own default). per_token decides independently for each token, "
        "so an image does not depend on its batch. With dynamic (the paper's rule) and static, the images in a batch "
        "compete in batch_pool models (and with static in expert_race models), so an image changes with --batch-size"
    )
    add("--routing", metavar="static|dynamic|per_token", help=text)
    text = (
        "average number of experts per token, positive and at most the number of experts (default: as in training); "
        "the first use calibrates the experts' thresholds and saves them next to the checkpoint"
    )
    add("--capacity", type=float, metavar="C", help=text)
    add(
        "--vae",
        type=nonempty,
        metavar="PATH|HUB_ID",
        help="directory or hub ID of the AutoencoderKL that decodes the latents of a latent model",
    )
    add("--weights", choices=("ema", "raw"), help="EMA weights or those of the last step (default: ema if present)")
    text = "images per batch on each rank (default: %(default)s)"
    add("--batch-size", type=int, default=50, metavar="B", help=text)
    text = (
        "precision of the weights and activations (default: bf16 on GPUs that support it, fp32 elsewhere); the sampler "
        "always computes in fp32"
    )
    add("--dtype", choices=("fp32", "bf16"), help=text)


def _add_sampler_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "sampler steps (default: %(default)s; the paper uses 250); no effect with dopri5"
    add("--steps", type=int, default=50, metavar="K", help=text)
    text = (
        "flow: euler (default), heun, dopri5 (adaptive steps) or sde (Euler-Maruyama); ddpm: ddpm (ancestral, "
        "default), ddim or dpm (DPM-Solver++)"
    )
    add("--sampler", metavar="NAME", help=text)
    add("--rtol", type=float, metavar="R", help="relative tolerance of dopri5 (default: 0.001)")
    add("--atol", type=float, metavar="A", help="absolute tolerance of dopri5 (default: 1e-06)")


def _add_guidance_options(parser: argparse.ArgumentParser, cfg_scale: float | None) -> None:
    add = parser.add_argument
    default = "the run's sample.cfg_scale" if cfg_scale is None else "%(default)s"
    text = f"guidance scale; 1 disables guidance (default: {default})"
    add("--cfg-scale", type=float, default=cfg_scale, metavar="G", help=text)
    text = "guided channels (default: all for flow, the first 3 for ddpm, as in DiT and in the reference code)"
    add("--guide-channels", type=_channels, metavar="all|C", help=text)
    text = (
        "range of noise levels, from 0 (clean) to 1 (noise), in which guidance is applied; outside it, only the "
        "conditional pass runs (default: 0 1)"
    )
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = (
        "autoguidance: a smaller or less trained model of the same data, whose prediction replaces the unconditional "
        "one; its EMA weights are used if present"
    )
    add("--autoguidance", type=nonempty_path, metavar="PATH", help=text)


def check_sampling_numbers(args: argparse.Namespace) -> None:
    """Check the values that can be checked without the model.

    Raises:
        ConfigError: a number is out of range.
    """
    require_positive(args, "batch_size", "steps")
    if args.cfg_scale is not None and not (math.isfinite(args.cfg_scale) and args.cfg_scale >= 0):
        raise ConfigError(f"--cfg-scale must be a finite number of at least 0, got {args.cfg_scale}.")


def resolve_settings(args: argparse.Namespace, config: Config) -> SamplingSettings:
    """Return the sampling settings for a model, with defaults filled in.

    Args:
        args: of `add_sampling_options`, with valid numbers.
        config: the model's configuration.

    Raises:
        ConfigError: an option does not fit the model.
    """
    from diffmoe_ds.diffusion.objective import SAMPLERS, make_objective
    from diffmoe_ds.sampling.dopri5 import Tolerances
    from diffmoe_ds.sampling.generate import SamplingSettings
    from diffmoe_ds.sampling.samplers import ADAPTIVE

    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise ConfigError(unknown("--sampler", args.sampler, SAMPLERS))
    tolerances = {name: getattr(args, name) for name in ("rtol", "atol") if getattr(args, name) is not None}
    settings = SamplingSettings(
        sampler=args.sampler or make_objective(config.objective.kind).samplers[0],
        steps=args.steps,
        cfg_scale=config.sample.cfg_scale if args.cfg_scale is None else args.cfg_scale,
        guide_channels=args.guide_channels,
        guidance_interval=None if args.guidance_interval is None else tuple(args.guidance_interval),
        autoguidance=None if args.autoguidance is None else str(args.autoguidance),
        tolerances=Tolerances(**tolerances),
    )
    settings.check(config)
    if settings.sampler not in ADAPTIVE:
        for name, value in tolerances.items():
            raise ConfigError(f"--{name} {value:g} has no effect with the sampler {settings.sampler}; omit it.")
    return settings


def check_sharded_sampler(settings: SamplingSettings, ep_size: int) -> None:
    """Check that ranks that share experts run the same number of forward passes.

    Args:
        settings: the settings.
        ep_size: number of ranks that share a model's experts; 1 if each rank holds all of them.

    Raises:
        ConfigError: the sampler's number of forward passes depends on the images.
    """
    from diffmoe_ds.sampling.samplers import ADAPTIVE

    if ep_size > 1 and settings.sampler in ADAPTIVE:
        raise ConfigError(
            f"--sampler {settings.sampler} needs --experts gathered: its number of forward passes depends on a rank's "
            "images, but ranks that share experts must run the same number; --sampler heun does."
        )


def open_guide(settings: SamplingSettings, config: Config) -> WeightsReader | None:
    """Open the guiding model of autoguidance.

    Args:
        settings: with the model's path.
        config: configuration of the guided model.

    Returns:
        The reader of its weights, or None without autoguidance.

    Raises:
        CheckpointError: it does not exist or is damaged.
        ConfigError: it cannot guide the model.
    """
    from diffmoe_ds.checkpoint.export import require_weights
    from diffmoe_ds.sampling.guidance import check_guide

    if settings.autoguidance is None:
        return None
    reader = require_weights(Path(settings.autoguidance), "--autoguidance")
    check_guide(reader.config, config, f"--autoguidance {reader.path}")
    return reader


def _channels(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be all or a number, got {text!r}") from None
