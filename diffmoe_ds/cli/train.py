"""``diffmoe train``: from arguments to a finished run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from diffmoe_ds.checkpoint.export import open_weights
from diffmoe_ds.checkpoint.layout import checkpoint_root
from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader, check_same_model, check_same_schedule
from diffmoe_ds.checkpoint.verify import candidates, check_sizes
from diffmoe_ds.config.deepspeed import DeepSpeedSettings, read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.load import DEFAULT_RECIPE, config_to_dict, dump_config, load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed.launch import Launch, resolve_launch
from diffmoe_ds.distributed.rendezvous import join_ranks
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.files import write_error, write_text
from diffmoe_ds.planning.traffic import assumed_hosts
from diffmoe_ds.sampling.generate import check_guidance
from diffmoe_ds.sampling.samplers import check_sampling

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
    choices = _resume_choices(args.resume, directory)
    reader = _first_look(choices, config, settings)
    source = _initial_weights(config) if reader is None else None

    # Only now: these import DeepSpeed, which takes seconds that a mistyped key should not cost.
    from diffmoe_ds.data.dataset import check_first_image, open_dataset
    from diffmoe_ds.distributed import deepspeed_seam as seam
    from diffmoe_ds.distributed.watchdog import Watchdog
    from diffmoe_ds.training.banner import banner, resumed_from
    from diffmoe_ds.training.loop import train
    from diffmoe_ds.training.resume import agree_on_checkpoint
    from diffmoe_ds.training.run_log import open_log
    from diffmoe_ds.training.setup import pool_rows, setup_run, together

    pool_rows(config, settings, launch.world)
    dataset = open_dataset(config)
    check_first_image(config, dataset)
    is_main = launch.rank == 0
    if args.dry_run:
        if is_main:
            hosts = assumed_hosts(launch.world, launch.local_world)
            starts = resumed_from(reader, config, settings, launch, source)
            print(banner(config, settings, launch, hosts, directory, len(dataset), starts), flush=True)
        return
    rendezvous = join_ranks(launch, _fingerprint(config, settings), config.run.start_timeout_s)
    with ExitStack() as held:
        lock = rendezvous.on_main("lock", lambda: held.enter_context(RunLock(directory)))
        choices = _resume_choices(args.resume, directory)  # again: the job before may have saved until it left
        reader = _first_look(choices, config, settings)
        if is_main:
            starts = resumed_from(reader, config, settings, launch, source)
            text = banner(config, settings, rendezvous.launch, rendezvous.hosts, directory, len(dataset), starts)
            print(text, flush=True)
        seam.quiet_deepspeed()
        seam.init_process_group()
        watchdog = held.enter_context(Watchdog(launch.rank, launch.world, config.run.rank_timeout_s))
        try:
            chosen = agree_on_checkpoint(choices, directory, seam.device())
            if chosen is not None and (reader is None or chosen != reader.path):
                reader = _open(chosen, config, settings)
                if is_main:
                    print(f"{'instead':>11}  {resumed_from(reader, config, settings, launch, None)}", flush=True)
            run = setup_run(config, settings, launch, directory, reader, source)
            run.began_from = _began_from(args.resume, reader)
            if args.resume == "none":
                run.again += " with --resume auto"
            # not before: a run that is refused leaves the file as it was
            together(lambda: _write_resolved(directory, config) if is_main else None)
            board = Path(settings.tensorboard_dir or directory / "tensorboard") if settings.tensorboard else None
            total = config.run.total_images
            log = together(lambda: open_log(directory, board, run.images, run.step, total, is_main=is_main))
            held.callback(log.close)
            saved = train(run, dataset, log, watchdog, lock, rendezvous.hosts)
        except RuntimeError as error:  # what a collective raises when a peer is gone, among other things
            lost = watchdog.find_lost()
            if lost is None:
                raise
            raise lost from error
    if is_main and saved is None:
        print(f"{'complete':>11}  {run.images:,} images were seen already; for more, raise run.total_images")
    dist.destroy_process_group()


def _fingerprint(config: Config, settings: DeepSpeedSettings) -> str:
    """What all ranks must have resolved alike."""
    everything = [config_to_dict(config), settings.json, version("diffmoe_ds"), version("deepspeed"), torch.__version__]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _configuration(args: argparse.Namespace, launch: Launch) -> tuple[Config, DeepSpeedSettings]:
    config = load_config(args.config, args.overrides)
    sampler = config.sample.sampler or make_objective(config.objective.kind).samplers[0]
    check_sampling(config.objective.kind, sampler, config.sample.steps)
    if config.run.sample_every_images:
        check_guidance(config.sample.cfg_scale, "all", config)
    if args.deepspeed_config is None:
        raw, source = config.deepspeed, f"{args.config}: deepspeed"
        if not raw:
            raise ConfigError(f"{args.config}: has no deepspeed section, so --deepspeed_config must name a JSON file.")
    else:
        if any(override.startswith("deepspeed.") for override in args.overrides):
            raise ConfigError("--set deepspeed...: changes the recipe's section, but --deepspeed_config replaces it.")
        raw, source = read_deepspeed_json(args.deepspeed_config), str(args.deepspeed_config)
        config = config.model_copy(update={"deepspeed": raw})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = resolve_deepspeed(raw, config, source, world=launch.world, local_world=launch.local_world, device=device)
    return config, settings


def _resume_choices(resume: str, directory: Path) -> list[Path]:
    """The checkpoints to continue from, the first choice first; none starts a new run."""
    own = candidates(directory)
    if resume == "auto":
        return own
    if resume == "none":
        if own:
            raise CheckpointError(
                f"{checkpoint_root(directory)}: holds the checkpoints of an earlier run, which --resume none would mix "
                "with its own; give another --run-dir, or --resume auto."
            )
        return []
    newest = _first_whole(own)
    if newest is not None and CheckpointReader(newest).meta.get("began_from") == os.path.abspath(resume):
        return own  # the same command again: it goes on where it has come to
    found = candidates(Path(resume))
    if not found:
        raise CheckpointError(f"--resume {resume}: is no checkpoint and no run directory with one.")
    if own and found[0].resolve().parent != own[0].resolve().parent:
        raise CheckpointError(
            f"{checkpoint_root(directory)}: holds the checkpoints of an earlier run, with which those of {found[0]} "
            "would be mixed; give another --run-dir."
        )
    return found


def _began_from(resume: str, reader: CheckpointReader | None) -> str | None:
    """The PATH of ``--resume PATH`` with which a run began, now or before it was stopped."""
    if resume not in ("auto", "none"):
        return os.path.abspath(resume)
    return None if reader is None else reader.meta.get("began_from")


def _first_whole(choices: list[Path]) -> Path | None:
    """The first choice whose files have the right sizes; their bytes are checked by all ranks together, later."""
    for path in choices:
        with suppress(CheckpointError):
            check_sizes(path)
            return path
    return None


def _first_look(choices: list[Path], config: Config, settings: DeepSpeedSettings) -> CheckpointReader | None:
    """The checkpoint to continue from, as far as one process can tell."""
    path = _first_whole(choices)
    return None if path is None else _open(path, config, settings)


def _open(path: Path, config: Config, settings: DeepSpeedSettings) -> CheckpointReader:
    """A checkpoint that this run can continue."""
    reader = CheckpointReader(path)
    check_same_model(reader, config)
    check_same_schedule(reader, settings.json.get("scheduler") is not None)
    return reader


def _initial_weights(config: Config) -> WeightsReader | None:
    """The model of ``model.init_from``."""
    if config.model.init_from is None:
        return None
    reader = open_weights(Path(config.model.init_from))
    if reader is None:
        raise CheckpointError(f"model.init_from {config.model.init_from}: is no exported model, checkpoint or run.")
    check_same_model(reader, config, except_for=("num_classes", "label_dropout"))
    return reader


def _write_resolved(directory: Path, config: Config) -> None:
    """The whole configuration, which ``--config`` takes again."""
    try:
        checkpoint_root(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(directory, error) from None
    write_text(directory / "resolved.yaml", dump_config(config))
