"""What a run prints before its first step: enough to see at a glance whether it is the run one meant."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader
from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.load import config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.planning.traffic import crossing_warning
from diffmoe_ds.training.setup import pool_rows


def resumed_from(
    reader: CheckpointReader | None, config: Config, settings: DeepSpeedSettings, launch: Launch,
    source: WeightsReader | None,
) -> str:  # fmt: skip
    """Where a run starts from, in words; whether its checkpoint is of another layout, and of which."""
    if reader is None:
        return "starts anew" if source is None else f"starts anew with the weights of {source.path}"
    was, meta = reader.meta["layout"], reader.meta
    now = {
        "world": launch.world, "ep_size": settings.ep_size, "zero_stage": settings.zero_stage,
        "global_batch": settings.global_batch, "micro_batch": settings.micro_batch,
        "accumulation": settings.accumulation,
    }  # fmt: skip
    text = f"continues {reader.path} at {meta['images']:,} images"
    changed = [f"{key} {was[key]} -> {now[key]}" for key in now if key in was and was[key] != now[key]]
    if changed:
        text += f", resharding: {', '.join(changed)}"
    if meta.get("began_from"):
        text += f", begun with --resume {meta['began_from']}"
    # not the deepspeed sections of the recipes, which may say "auto", but what became of them
    resolved = settings.beside_layout()
    before = _flat({**config_to_dict(reader.config), "deepspeed": meta.get("deepspeed", resolved)})
    after = _flat({**config_to_dict(config), "deepspeed": resolved})
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    other = [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys]
    return text + (f"; changed since it was saved: {', '.join(other)}" if other else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested sections, by its dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def banner(
    config: Config,
    settings: DeepSpeedSettings,
    launch: Launch,
    hosts: tuple[str, ...],
    directory: Path,
    num_images: int,
    resumed: str,
) -> str:
    """The lines, ready to print.

    Args:
        config: the run.
        settings: the resolved DeepSpeed JSON.
        launch: this process's place.
        hosts: the host of every rank.
        directory: the run's directory.
        num_images: images of the data set.
        resumed: where the run starts from, in words.
    """
    model, routing, size = config.model, config.routing, config.size
    counts = count_parameters(config)
    tokens, rows = pool_rows(config, settings, launch.world)
    world, ep = launch.world, settings.ep_size
    if config.num_experts > 1:
        experts = f"{config.num_experts} experts in {'every second' if routing.interleave else 'every'} block"
        if routing.kind == "batch_pool":
            per = "one micro-batch" if settings.accumulation > 1 else "a batch"
            scope = {"rank": "one rank", "ep": f"the {ep} rank(s) of an EP group", "world": f"all {world} rank(s)"}
            pool = f"{tokens:,} tokens of {per} over {scope[routing.pool]}; each expert takes K = {rows:,}"
        else:
            pool = "none: every image or token is routed by itself"
    else:
        experts, pool = "dense", "none: the model is dense"
    crossing = crossing_warning(config, settings, hosts)
    precision = "bf16 with fp32 master weights" if settings.bf16 else "fp32"
    lines = [
        ("model", f"{model.name}: {size.depth} blocks, width {size.hidden_size}, {size.num_heads} heads; {experts}"),
        ("parameters", f"{counts.total / 1e6:,.2f} M total, {counts.activated / 1e6:,.2f} M activated"),
        ("routing", f"{routing.kind}, capacity {routing.capacity:g}; {config.objective.kind} objective"),
        ("pool", pool),
        ("world", f"{world} = EP {ep} x EDP {world // ep}, ZeRO {settings.zero_stage}, {precision}"),
        ("launch", launch.describe()),
        (
            "batch",
            f"{settings.global_batch} images = {settings.micro_batch} a rank x {settings.accumulation} micro-step(s) "
            f"x {world} rank(s)",
        ),
        ("data", f"{config.data.path or 'embedded Fashion-MNIST'}, {num_images:,} images"),
        ("length", f"{config.run.total_images:,} images; {resumed}"),
        ("run", str(directory)),
        (
            "versions",
            f"diffmoe_ds {version('diffmoe_ds')}, deepspeed {version('deepspeed')}, torch {torch.__version__}, "
            f"python {platform.python_version()} on {sys.platform}",
        ),
        *(("note", note) for note in settings.notes),
        *([("warning", crossing)] if crossing else []),
    ]
    return "\n".join(f"{name:>11}  {text}" for name, text in lines)
