"""The startup banner of a run, and the same plan as JSON for scripts."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from diffmoe_ds.checkpoint.export import LARGE_SHARE
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata
from diffmoe_ds.config.load import config_to_dict, differences
from diffmoe_ds.data.dataset import missing_classes, truncated_captions
from diffmoe_ds.moe.capacity import tokens_per_expert
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.planning.pool import pool_rows
from diffmoe_ds.planning.traffic import crossing_warning
from diffmoe_ds.text import counted
from diffmoe_ds.training.plan import TrainPlan
from diffmoe_ds.training.resume import continued

DEFAULT_WARMUP_STEPS = 1000
"""DeepSpeed's ``warmup_num_steps``."""


def banner(plan: TrainPlan, hosts: tuple[str, ...]) -> str:
    """Return the banner as text.

    Args:
        plan: the run.
        hosts: the host of every rank.
    """
    config, settings, launch = plan.config, plan.settings, plan.launch
    counts = count_parameters(config)
    world, ep = launch.world, settings.ep_size
    precision = "bf16 with fp32 master weights" if settings.bf16 else "fp32"
    lines = [
        ("model", _model(plan)),
        ("parameters", f"{counts.total / 1e6:,.2f} M total, {counts.activated / 1e6:,.2f} M activated"),
        (
            "routing",
            ", ".join([config.routing.kind, f"capacity {config.routing.capacity:g}", *config.router_options])
            + f"; {config.objective.kind} objective",
        ),
        ("pool", _pool(plan)),
        ("world", f"{world} = EP {ep} x EDP {world // ep}, ZeRO {settings.zero_stage}, {precision}"),
        ("launch", launch.describe()),
        (
            "batch",
            f"{counted(settings.global_batch, 'image')} = {settings.micro_batch} per rank x {settings.accumulation} "
            f"micro-step(s) x {world} rank(s)",
        ),
        ("data", f"{config.data.path or 'embedded Fashion-MNIST'}, {counted(len(plan.dataset), 'image')}"),
        *_evaluation(plan),
        ("length", f"{counted(config.run.total_images, 'image')}; {describe_start(plan)}"),
        ("run", str(plan.directory)),  # slurm/train.sbatch, and copies of it on clusters, parse this line
        (
            "versions",
            f"diffmoe_ds {version('diffmoe_ds')}, deepspeed {version('deepspeed')}, torch {version('torch')}, "
            f"python {platform.python_version()} on {sys.platform}",
        ),
        *(("note", note) for note in _notes(plan)),
        *(("warning", warning) for warning in _warnings(plan, hosts)),
    ]
    return aligned(lines)


def aligned(lines: Iterable[tuple[str, str]]) -> str:
    """Return (label, text) as lines of the banner."""
    return "\n".join(f"{name:>11}  {text}" for name, text in lines)


def summary(plan: TrainPlan, hosts: tuple[str, ...]) -> dict[str, Any]:
    """Return the plan as plain data, for ``diffmoe train --dry-run --json``.

    Args:
        plan: the run.
        hosts: the host of every rank.

    Returns:
        ``run_dir``; ``checkpoint`` to resume from (``path`` and ``images``, or None); ``total_images``;
        ``complete`` (whether the checkpoint has reached them); ``world``, ``ep_size``, ``zero_stage``, ``bf16``;
        ``global_batch``, ``micro_batch``, ``accumulation``; ``dataset_images``; ``params_total``, ``params_activated``;
        ``notes`` and ``warnings`` (lists of sentences).
    """
    config, settings = plan.config, plan.settings
    counts = count_parameters(config)
    return {
        "run_dir": str(plan.directory),
        "checkpoint": None if plan.reader is None else {"path": str(plan.reader.path), "images": plan.images},
        "total_images": config.run.total_images,
        "complete": plan.images >= config.run.total_images,
        "world": plan.launch.world,
        "ep_size": settings.ep_size,
        "zero_stage": settings.zero_stage,
        "bf16": settings.bf16,
        "global_batch": settings.global_batch,
        "micro_batch": settings.micro_batch,
        "accumulation": settings.accumulation,
        "dataset_images": len(plan.dataset),
        "params_total": counts.total,
        "params_activated": counts.activated,
        "notes": _notes(plan),
        "warnings": _warnings(plan, hosts),
    }


def describe_start(plan: TrainPlan) -> str:
    """Describe where a run starts from and what has changed since its checkpoint was saved."""
    reader, settings = plan.reader, plan.settings
    if reader is None:
        return "starting from scratch" if plan.initial is None else f"starting from the weights of {plan.initial.path}"
    saved = reader.metadata
    was = saved.layout.known()
    now = {
        "world": plan.launch.world, "ep_size": settings.ep_size, "zero_stage": settings.zero_stage,
        "global_batch": settings.global_batch, "micro_batch": settings.micro_batch,
        "accumulation": settings.accumulation,
    }  # fmt: skip
    text = f"continues {reader.path} at {saved.images:,} images"
    changed = [f"{key} {was[key]} -> {now[key]}" for key in now if key in was and was[key] != now[key]]
    if changed:
        text += f", resharding: {', '.join(changed)}"
    if saved.began_from:
        text += f", begun with --resume {saved.began_from}"
    text += _changed_schedule(plan, saved)
    # compare the resolved DeepSpeed settings, because the recipe's section may contain "auto"
    resolved = settings.beside_layout()
    recorded = resolved if saved.deepspeed is None else saved.deepspeed
    before = {**config_to_dict(reader.config), "deepspeed": recorded}
    after = {**config_to_dict(continued(plan.config, reader.config)), "deepspeed": resolved}
    other = [f"{key} {old} -> {new}" for key, (old, new) in differences(before, after).items()]
    return text + (f"; changed since it was saved: {', '.join(other)}" if other else "")


def _changed_schedule(plan: TrainPlan, saved: CheckpointMetadata) -> str:
    """Describe that a run has a learning-rate schedule and its checkpoint has none or another one, or vice versa."""
    schedule, lr = plan.settings.json.get("scheduler"), plan.settings.json["optimizer"]["params"]["lr"]
    if schedule is None and saved.lr_scheduler is not None:
        return f", without its learning-rate schedule: from {saved.lr_now.lr:g} to a constant {lr:g}"
    if schedule is not None and saved.lr_scheduler is None:
        return f", with a new learning-rate schedule: {schedule['type']} from step {saved.step} on"
    before = (saved.deepspeed or {}).get("scheduler")
    was = before.get("type") if isinstance(before, dict) else None
    if schedule is not None and was is not None and schedule["type"] != was:
        return f", with another learning-rate schedule: {schedule['type']} instead of {was}, from step {saved.step} on"
    return ""


def _model(plan: TrainPlan) -> str:
    size = plan.config.size
    experts = "dense"
    if plan.config.num_experts > 1:
        blocks = "every second" if plan.config.routing.interleave else "every"
        experts = f"{plan.config.num_experts} experts in {blocks} block"
    return f"{plan.config.model_name}: {size.depth} blocks, width {size.hidden_size}, {size.num_heads} heads; {experts}"


def _pool(plan: TrainPlan) -> str:
    config, settings, world = plan.config, plan.settings, plan.launch.world
    if config.num_experts == 1:
        return "none: the model is dense"
    if not config.has_pool:
        return "none: each image or token is routed independently"
    tokens, rows = pool_rows(config, settings, world)
    if config.routing.pool_images is not None:
        images = "1 image" if config.routing.pool_images == 1 else f"{config.routing.pool_images} images"
        return f"{tokens:,} tokens of {images}; each expert takes K = {rows:,}"
    batch = "one micro-batch" if settings.accumulation > 1 else "a batch"
    scope = {
        "rank": "one rank",
        "ep": f"the {settings.ep_size} rank(s) of an EP group",
        "world": f"all {world} rank(s)",
    }
    taken = f"each expert takes K = {rows:,}"
    if config.routing.kind == "expert_race":
        taken = f"all experts together take K = {tokens_per_expert(config.routing.capacity, tokens, 1):,}"
    return f"{tokens:,} tokens of {batch} over {scope[config.routing.pool]}; {taken}"


def _evaluation(plan: TrainPlan) -> list[tuple[str, str]]:
    if plan.held_out is None:
        return []
    config = plan.config.eval
    text = f"{plan.config.data.validation_path}, {counted(len(plan.held_out), 'image')}, "
    text += f"every {config.every_images:,} images"
    if config.metrics:
        text += f"; {', '.join(config.metrics)} of {config.metric_images:,} images by {config.extractor}"
    return [("validation", text)]


def _notes(plan: TrainPlan) -> list[str]:
    notes = list(plan.settings.notes)
    if unused := plan.config.objective.unused:
        notes.append(f"no effect with {_objective(plan)}: {', '.join(f'objective.{key}' for key in unused)}")
    if unused := plan.config.unused_routing:
        notes.append(f"no effect with this router: {', '.join(f'routing.{key}' for key in unused)}")
    if plan.reader is None and plan.inherited:
        notes.append(f"from model.init_from {plan.config.model.init_from}: {', '.join(plan.inherited)}")
    return notes


def _objective(plan: TrainPlan) -> str:
    objective = plan.config.objective
    return objective.kind if objective.kind != "flow" else f"{objective.time_distribution} times"


def _warnings(plan: TrainPlan, hosts: tuple[str, ...]) -> list[str]:
    found = (
        crossing_warning(plan.config, plan.settings, hosts),
        _average_warning(plan),
        _warmup_warning(plan),
        missing_classes(plan.config, plan.dataset),
        truncated_captions(plan.config, plan.dataset),
    )
    return [warning for warning in found if warning]


def _warmup_warning(plan: TrainPlan) -> str | None:
    """Return a sentence if the learning rate still rises when the run ends."""
    schedule = plan.settings.json.get("scheduler", {"type": "none"})
    if not schedule["type"].startswith("Warmup"):
        return None
    warmup = schedule.get("params", {}).get("warmup_num_steps", DEFAULT_WARMUP_STEPS)
    steps = -(-plan.config.run.total_images // plan.settings.global_batch)
    if warmup < steps:
        return None
    return (
        f"the warm-up of the learning rate takes {counted(warmup, 'step')}, but the run has {counted(steps, 'step')}; "
        "lower optimizer.warmup_images, or scheduler.params.warmup_num_steps if the DeepSpeed JSON has a scheduler"
    )


def _average_warning(plan: TrainPlan) -> str | None:
    """Return a sentence if the average at the end of the run will still contain too much of the initial weights."""
    ema = plan.config.ema if plan.reader is None else continued(plan.config, plan.reader.config).ema
    share = ema.initial_share(-(-plan.config.run.total_images // plan.settings.global_batch))
    if share <= LARGE_SHARE:
        return None
    return f"at the end, the averaged weights will contain {share:.0%} of the initial weights; lower ema.decay"
