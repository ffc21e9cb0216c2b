"""``diffmoe plan``: parameters, memory, traffic and time of a training run before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.config.deepspeed import read_deepspeed_json
from diffmoe_ds.config.fields import AUTO_CLASSES, AUTO_FEATURES, AUTO_TEXT
from diffmoe_ds.config.load import read_recipe
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe plan
  diffmoe plan --model L-E16 --world 64 --ep 8 --zero 2 --micro-batch 32
  diffmoe plan --model L-E16 --world 1024 --micro-batch 4 --simulate
  diffmoe plan --model XL-E16 --gpu A100-40GB --set model.activation_checkpointing=true
  diffmoe plan --model T2I-E16 --world 64 --ep 16 --zero 2 --micro-batch 8
  diffmoe plan --config fashion --world 2 --dtype fp32 --json

Times come from a simple model; docs/planning.md lists its assumptions.
"""
RECIPE = "imagenet-256"
"""The default recipe: the paper's models on 256-pixel images."""
CLASSES = 1000
"""Assumed number of classes where the training set decides."""
TEXT_ENCODERS = ((77, 768, 768),)
"""Assumed shape of the text features where the training set decides: that of the text encoder of CLIP ViT-L/14."""
IMAGE_FEATURES = (16, 768)
"""Assumed shape of the image features of REPA where the training set decides: that of DINOv2 ViT-B/14 at 224 pixels."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe plan``."""
    add = parser.add_argument
    add("--config", default=RECIPE, metavar="RECIPE", help="packaged recipe or YAML file (default: %(default)s)")
    add(
        "--deepspeed_config",
        metavar="JSON|NAME",
        help="DeepSpeed JSON, or the name of a shipped one, such as zero2 (default: the recipe's deepspeed section)",
    )
    add("--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="override recipe keys")
    add("--model", metavar="NAME", help="model.name, such as L-E16 or Dense-L (default: the recipe's)")
    add("--pool", choices=("rank", "ep", "world"), help="routing.pool (default: the recipe's)")
    add("--world", type=int, default=8, metavar="W", help="number of GPUs (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs per node (default: %(default)s)")
    add("--ep", type=int, metavar="P", help="expert-parallel size (default: the JSON's; auto: a node's largest)")
    add("--zero", type=int, choices=(0, 1, 2, 3), metavar="Z", help="ZeRO stage (default: the JSON's)")
    add("--micro-batch", type=int, metavar="B", help="images per GPU and forward pass (default: from the JSON)")
    add("--accumulation", type=int, metavar="N", help="forward passes per optimizer step (default: from the JSON)")
    add("--dtype", choices=("bf16", "fp32"), help="precision (default: the JSON's; auto: bf16)")
    add("--gpu", default="H100", metavar="NAME", help="GPU model for memory and step times (default: %(default)s)")
    add(
        "--simulate", action="store_true",
        help="run rank 0 of the whole model on fake tensors, and count its activations and collectives",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of text")


def plan_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe plan``.

    Raises:
        ConfigError: an option, the recipe or the DeepSpeed JSON is invalid.
        TopologyError: the EP size does not divide the experts and the GPUs.
    """
    given = [name for name in ("micro_batch", "accumulation", "ep") if getattr(args, name) is not None]
    require_positive(args, "world", "gpus_per_node", *given)
    named = {"model.name": args.model, "routing.pool": args.pool}
    overrides = [*args.overrides, *(f"{key}={value}" for key, value in named.items() if value is not None)]
    try:
        config = _read_recipe(args.config, overrides)
    except ConfigError as error:
        if args.model is not None:
            error.args = (str(error).replace("--set: model.name", "--model"),)
        raise
    assumed = _assumed(config)
    for key, value in assumed.items():
        section, _, name = key.partition(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    if args.deepspeed_config is not None:
        raw, source = read_deepspeed_json(args.deepspeed_config), args.deepspeed_config
    elif config.deepspeed:
        raw, source = config.deepspeed, f"{args.config}: deepspeed"
    else:
        raise ConfigError(
            f"{args.config}: the recipe has no deepspeed section; pass --deepspeed_config, such as zero2."
        )

    # imported lazily so that typos fail fast
    from diffmoe_ds.distributed.quiet import quiet_deepspeed
    from diffmoe_ds.planning.devices import device_named
    from diffmoe_ds.planning.layout import LayoutRequest, resolve_layout
    from diffmoe_ds.planning.summary import plan_summary
    from diffmoe_ds.planning.table import plan_table

    device = device_named(args.gpu)
    bf16 = None if args.dtype is None else args.dtype == "bf16"
    request = LayoutRequest(
        args.world, args.gpus_per_node, args.ep, args.zero, args.micro_batch, args.accumulation, bf16
    )
    layout = resolve_layout(request, config, raw, source)
    quiet_deepspeed()
    plan = plan_summary(layout, device, args.simulate, assumed)
    print(json.dumps(plan) if args.json else plan_table(plan), flush=True)


def _assumed(config: Config) -> dict[str, Any]:
    """Return assumed values for the keys that a run takes from its training set."""
    found: dict[str, Any] = {}
    if config.is_text and config.model.text_encoders == AUTO_TEXT:
        found["model.text_encoders"] = TEXT_ENCODERS
    if not config.is_text and config.model.num_classes == AUTO_CLASSES:
        found["model.num_classes"] = CLASSES
    if config.aligned_block is not None and config.loss.repa_features == AUTO_FEATURES:
        found["loss.repa_features"] = IMAGE_FEATURES
    return found


def _read_recipe(name: str, overrides: Sequence[str]) -> Config:
    """Return the configuration; with ``model.init_from``, the model is that of a run that starts from it."""
    recipe = read_recipe(name, overrides)
    if recipe.init_from is None:
        return recipe.config()
    from diffmoe_ds.training.fine_tuning import resolve_start

    return resolve_start(recipe).config
