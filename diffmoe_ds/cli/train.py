"""``diffmoe train``: resolve the arguments to a plan, join the other ranks, train."""

from __future__ import annotations

import argparse
import json

from diffmoe_ds.cli.arguments import nonempty, nonempty_path
from diffmoe_ds.config.load import DEFAULT_RECIPE
from diffmoe_ds.distributed.launch import Launch, resolve_launch
from diffmoe_ds.errors import ConfigError, DiffMoEError, as_reported
from diffmoe_ds.training.plan import TrainPlan, TrainRequest, resolve_plan

EXAMPLES = """examples:
  diffmoe train
  diffmoe train --set routing.kind=expert_choice --set run.total_images=10_000 --run-dir runs/ec
  diffmoe train --dry-run --json
  torchrun --nproc_per_node 2 -m diffmoe_ds.train --set objective.kind=ddpm --run-dir runs/ddpm
  deepspeed --num_nodes 4 --module diffmoe_ds.train --deepspeed_config zero2
"""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe train``, which `diffmoe_ds/train.py` shares."""
    add = parser.add_argument
    add("--config", type=nonempty, metavar="RECIPE", help="packaged recipe or YAML file (default: %(default)s)")
    parser.set_defaults(config=DEFAULT_RECIPE)
    text = "DeepSpeed JSON, or the name of a shipped one, such as zero2 (default: the recipe's deepspeed section)"
    add("--deepspeed_config", type=nonempty, metavar="JSON|NAME", help=text)
    add("--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="override recipe keys")
    text = "run directory (default: runs/RECIPE, or that of a run's own resolved.yaml)"
    add("--run-dir", type=nonempty_path, metavar="DIR", help=text)
    add(
        "--resume", type=nonempty, default="auto", metavar="auto|none|PATH",
        help="resume from the newest checkpoint of the run directory, start from scratch, or resume from PATH "
        "(default: %(default)s)",
    )  # fmt: skip
    text = "check everything, print the banner and an estimate of the memory, and exit; writes nothing"
    add("--dry-run", action="store_true", help=text)
    text = "with --dry-run: also read all images, and name those that cannot be read, and checkpoints over 1 GiB"
    add("--thorough", action="store_true", help=text)
    add(
        "--json", action="store_true",
        help="with --dry-run: print one JSON object instead, with run_dir, checkpoint (path and images, or null), "
        "total_images, complete, world, ep_size, zero_stage, bf16, global_batch, micro_batch, accumulation, "
        "dataset_images, params_total, params_activated, notes and warnings; memory_per_rank_gb, memory_parts_gb, "
        "memory_peak_phase, device, device_gb, fits; with --thorough: unreadable and unreadable_allowed",
    )  # fmt: skip
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher


def train_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe train``.

    Raises:
        DiffMoEError: see `resolve_plan`, `session.join` and `loop.train`. Before the ranks join, errors of a
            single rank are reported through the rendezvous.
    """
    for name in ("json", "thorough"):
        if getattr(args, name) and not args.dry_run:
            raise ConfigError(f"--{name} needs --dry-run.")
    launch = resolve_launch()
    plan = _resolve(args, launch)
    if args.dry_run:
        if plan.is_main:
            _dry_run(plan, args.json, args.thorough)
        return

    # imported lazily so that typos fail fast: these load DeepSpeed
    from diffmoe_ds.distributed.surplus import wait_for_run
    from diffmoe_ds.training.loop import train
    from diffmoe_ds.training.session import join

    if plan.launch.is_surplus:
        wait_for_run(plan.launch, plan.config.run.start_timeout_s, plan.config.run.rank_timeout_s)
        return
    with join(plan) as session:
        run = session.prepare()
        log, batches = session.open_log(run), session.open_batches(run)
        saved = train(run, batches, log, session.watchdog, session.lock, session.hosts)
        session.finish(run, saved)


def _resolve(args: argparse.Namespace, launch: Launch) -> TrainPlan:
    request = TrainRequest(args.config, args.overrides, args.deepspeed_config, args.run_dir, args.resume)
    try:
        return resolve_plan(request, launch)
    except (DiffMoEError, OSError) as raised:
        error = as_reported(raised)
        if launch.world > 1 and not error.same_on_all_ranks and not args.dry_run:
            from diffmoe_ds.distributed.rendezvous import fail_together

            fail_together(launch, error)
        raise error from None


def _dry_run(plan: TrainPlan, as_json: bool, thorough: bool) -> None:
    """Print the plan with a verified checkpoint, the needed memory and, if asked, whether its images can be read."""
    from diffmoe_ds.planning.traffic import assumed_hosts
    from diffmoe_ds.training.banner import aligned, banner, summary
    from diffmoe_ds.training.dry_run import estimate_memory, read_all_images, verify_checkpoint

    plan = verify_checkpoint(plan, thorough=thorough)
    hosts = assumed_hosts(plan.launch.world, plan.launch.local_world)
    memory = estimate_memory(plan)
    if not as_json:
        print(f"{banner(plan, hosts)}\n{aligned(memory.lines())}", flush=True)
    sets = read_all_images(plan) if thorough else []
    if as_json:
        unreadable = {each.key: each.problems for each in sets}
        allowed = {each.key: each.allowed for each in sets}
        read = {"unreadable": unreadable, "unreadable_allowed": allowed} if thorough else {}
        print(json.dumps({**summary(plan, hosts), **memory.summary(), **read}), flush=True)
    for each in sets:
        if not as_json:
            print(aligned(each.lines()), flush=True)
    for each in sets:
        each.check()
