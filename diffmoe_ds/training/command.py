"""``diffmoe train``: from arguments to a finished run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from diffmoe_ds.checkpoint.layout import checkpoint_root
from diffmoe_ds.checkpoint.load import CheckpointReader, check_same_model, find_checkpoint
from diffmoe_ds.config.deepspeed import DeepSpeedSettings, read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.load import DEFAULT_RECIPE, dump_config, load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.diffusion.samplers import check_sampling
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.parallel.launch import Launch, export_launch, resolve_launch

EXAMPLES = """examples:
  diffmoe train
  diffmoe train --set routing.kind=expert_choice --set run.total_images=10_000 --run-dir runs/ec
  torchrun --nproc_per_node 2 diffmoe_ds/train.py --set objective.kind=ddpm --run-dir runs/ddpm
  deepspeed --num_nodes 4 diffmoe_ds/train.py --deepspeed_config ds_configs/zero2.json
"""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffmoe train`` and of ``diffmoe_ds/train.py``."""
    parser.add_argument("--config", metavar="RECIPE", help="packaged recipe or YAML file (default: %(default)s)")
    parser.set_defaults(config=DEFAULT_RECIPE)
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed JSON (default: the recipe's own section)")
    parser.add_argument(
        "--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="change a recipe's key"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH",
        help="continue the newest checkpoint of the run directory, start anew, or continue a given checkpoint",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the banner and leave")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # what the deepspeed launcher passes


def train_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe train``.  Everything that can be wrong with the arguments is said before any rank is joined."""
    launch = resolve_launch()
    config, settings = _configuration(args, launch)
    directory = args.run_dir or Path("runs") / Path(args.config).stem
    checkpoint = _resume_from(args.resume, directory)
    reader = None if checkpoint is None else CheckpointReader(checkpoint)
    if reader is not None:
        check_same_model(reader, config)

    # Only now: these import DeepSpeed, which takes seconds that a mistyped key should not cost.
    from diffmoe_ds.data.dataset import open_dataset
    from diffmoe_ds.parallel import deepspeed_seam as seam
    from diffmoe_ds.training.banner import banner
    from diffmoe_ds.training.loop import train
    from diffmoe_ds.training.metrics import MetricsWriter
    from diffmoe_ds.training.setup import pool_rows, setup_run

    pool_rows(config, settings, launch.world)
    dataset = open_dataset(config)
    is_main = launch.rank == 0
    if is_main:
        resumed = "starts anew" if reader is None else f"continues {reader.path} at {reader.meta['images']:,} images"
        print(banner(config, settings, launch, directory, len(dataset), resumed), flush=True)
    if args.dry_run:
        return
    if is_main:
        _write_resolved(directory, config)
    export_launch(launch)
    seam.quiet_deepspeed()
    seam.init_process_group()
    run = setup_run(config, settings, launch, directory, reader)
    metrics = None
    if is_main:
        board = Path(settings.tensorboard_dir or directory / "tensorboard") if settings.tensorboard else None
        metrics = MetricsWriter(directory, board, run.images, run.step, config.run.total_images)
    try:
        saved = train(run, dataset, metrics)
    finally:
        if metrics is not None:
            metrics.close()
    if is_main and saved is None:
        print(f"{'complete':>11}  {run.images:,} images were seen already; for more, raise run.total_images")
    dist.destroy_process_group()


def _configuration(args: argparse.Namespace, launch: Launch) -> tuple[Config, DeepSpeedSettings]:
    config = load_config(args.config, args.overrides)
    sampler = config.sample.sampler or make_objective(config.objective.kind).samplers[0]
    check_sampling(config.objective.kind, sampler, config.sample.steps)
    if args.deepspeed_config is None:
        raw, source = config.deepspeed, f"{args.config}: deepspeed"
        if not raw:
            raise ConfigError(f"{args.config}: has no deepspeed section, so --deepspeed_config must name a JSON file.")
    else:
        raw, source = read_deepspeed_json(args.deepspeed_config), str(args.deepspeed_config)
        config = replace(config, deepspeed=raw)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = resolve_deepspeed(raw, config, source, world=launch.world, local_world=launch.local_world, device=device)
    return config, settings


def _resume_from(resume: str, directory: Path) -> Path | None:
    if resume == "auto":
        return find_checkpoint(directory)
    if resume == "none":
        if find_checkpoint(directory) is not None:
            raise CheckpointError(
                f"{checkpoint_root(directory)}: holds the checkpoints of an earlier run, which --resume none would mix "
                "with its own; give another --run-dir, or --resume auto."
            )
        return None
    found = find_checkpoint(Path(resume))
    if found is None:
        raise CheckpointError(f"--resume {resume}: is no checkpoint and no run directory with one.")
    return found


def _write_resolved(directory: Path, config: Config) -> None:
    """The whole configuration, which ``--config`` takes again."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolved.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}.") from None
