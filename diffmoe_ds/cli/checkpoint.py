"""``diffmoe checkpoint``: inspect and convert checkpoints, in one process without a process group."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ds.cli.arguments import nonempty_path, require_positive
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.text import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffmoe_ds.checkpoint.load import CheckpointReader
    from diffmoe_ds.model.dit import DiT

EXAMPLES = """examples:
  diffmoe checkpoint inspect runs/fashion
  diffmoe checkpoint export runs/fashion --out exported
  diffmoe checkpoint export runs/fashion --format diffusers --out for-diffusers
  diffmoe checkpoint reshard runs/fashion --world 24 --ep 8 --out runs/moved/checkpoints/images_000000030016
  diffmoe checkpoint import-official DiffMoE-L-E8.pt --out imported
  diffmoe sample --checkpoint exported --out samples
"""
WEIGHTS_HELP = "EMA or last weights (default: %(default)s)"


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``diffmoe checkpoint`` to its parser."""
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")

    def command(name: str, text: str, act: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(act=act)
        return sub

    inspect = command("inspect", "show the contents of a checkpoint, run directory or exported model", _inspect)
    inspect.add_argument("path", type=nonempty_path, help="a checkpoint, run directory or exported model")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    text = "verify every byte, or only sizes (default: every byte of checkpoints up to 1 GiB)"
    inspect.add_argument("--full", action=argparse.BooleanOptionalAction, help=text)

    reshard = command("reshard", "rewrite a checkpoint for another layout (not needed to resume)", _reshard)
    reshard.add_argument("path", type=nonempty_path, help="a checkpoint or a run directory")
    reshard.add_argument("--world", type=int, required=True, metavar="W", help="number of ranks")
    reshard.add_argument("--ep", type=int, default=1, metavar="P", help="expert-parallel size (default: %(default)s)")
    reshard.add_argument(
        "--out", type=nonempty_path, required=True, metavar="DIR", help="directory of the new checkpoint"
    )

    _add_export(command("export", "write a model for sampling and fine-tuning, or for diffusers", _export))

    reference = command("import-official", "convert the reference's .pt file to an exported model", _import)
    reference.add_argument("path", type=nonempty_path, help="the .pt file")
    reference.add_argument(
        "--out", type=nonempty_path, required=True, metavar="DIR", help="directory of the exported model"
    )
    text = "EMA or last weights (default: ema if the file has them)"
    reference.add_argument("--weights", choices=("ema", "raw"), help=text)
    text = (
        "the reference's YAML (default: the one beside the file or its directory checkpoints/, if there is one), or a "
        "YAML or JSON file with kind, model and moe as in diffmoe_ds.load_official"
    )
    reference.add_argument("--reference-config", type=nonempty_path, metavar="FILE", help=text)
    reference.add_argument(
        "--kind",
        choices=("dense", "tc", "ec", "diffmoe", "promoe", "promoe_ec", "dsmoe"),
        help="model class (default: as in the YAML or the weights)",
    )
    text = "attention heads (default: as in the YAML, or as published)"
    reference.add_argument("--num-heads", type=int, metavar="N", help=text)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("path", type=nonempty_path, help="a checkpoint or a run directory")
    export.add_argument(
        "--out", type=nonempty_path, required=True, metavar="DIR", help="directory of the exported model"
    )
    text = (
        "native: model.safetensors and config.json; diffusers: a folder that diffusers loads, also from an exported "
        "model (default: %(default)s)"
    )
    export.add_argument("--format", choices=("native", "diffusers"), default="native", help=text)
    text = "with --format diffusers: folder of the AutoencoderKL to copy (default: eval.vae or data.vae of the run)"
    export.add_argument("--vae", type=nonempty_path, metavar="DIR", help=text)
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help=WEIGHTS_HELP)
    export.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights (default: %(default)s)"
    )


def checkpoint_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe checkpoint``."""
    args.act(args)


def _inspect(args: argparse.Namespace) -> None:
    from diffmoe_ds.checkpoint.inspect import describe, readable

    found = describe(args.path, full=args.full)
    print(json.dumps(found, indent=1) if args.json else readable(found))
    broken = [entry for entry in found["checkpoints"] if entry["problem"]]
    if broken:
        count = len(found["checkpoints"])
        raise CheckpointError(f"{args.path}: {len(broken)} of {count} checkpoint{'' if count == 1 else 's'} damaged.")


def _reshard(args: argparse.Namespace) -> None:
    from diffmoe_ds.checkpoint.reshard import reshard
    from diffmoe_ds.topology import check_world

    check_world("--world", args.world)
    require_positive(args, "world")
    reader = _checkpoint(args.path)
    reshard(reader, args.out, args.world, args.ep)
    print(f"{reader.path} -> {args.out}: {args.world} rank(s), EP {args.ep}")


def _export(args: argparse.Namespace) -> None:
    import torch

    from diffmoe_ds.checkpoint.export import check_no_model, export, initial_weights_warning

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.format == "diffusers":
        _export_diffusers(args, dtype)
        return
    if args.vae is not None:
        raise ConfigError(f"--vae {args.vae} needs --format diffusers; omit it.")
    check_no_model(args.out)
    reader = _checkpoint(args.path)
    print(f"{reader.path} -> {export(reader, args.weights, args.out, dtype)} ({args.weights} weights)")
    warning = initial_weights_warning(reader, args.weights)
    if warning is not None:
        print(f"diffmoe: warning: {warning}", file=sys.stderr)


def _export_diffusers(args: argparse.Namespace, dtype: torch.dtype) -> None:
    from diffmoe_ds.checkpoint.export import require_weights
    from diffmoe_ds.interop.card import model_card, notes
    from diffmoe_ds.interop.folder import FolderExport, check_new, check_supported, find_vae, read_vae, write_folder

    check_new(args.out)
    reader = require_weights(args.path)
    check_supported(reader.config)
    vae = find_vae(reader.config) if args.vae is None else read_vae(args.vae, reader.config)
    plan = FolderExport(reader, args.weights, dtype, vae)
    write_folder(plan, args.out, model_card(plan))
    print(f"{reader.path} -> {args.out} ({args.weights} weights); README.md says how to load it")
    for note in notes(plan):
        print(f"diffmoe: note: {note}", file=sys.stderr)


def _import(args: argparse.Namespace) -> None:
    import torch

    from diffmoe_ds.checkpoint.description import Description
    from diffmoe_ds.checkpoint.export import check_no_model, write_model
    from diffmoe_ds.checkpoint.reference import load_official
    from diffmoe_ds.checkpoint.reference_config import infer_reference
    from diffmoe_ds.checkpoint.reference_weights import read_reference
    from diffmoe_ds.checkpoint.reference_yaml import find_reference_yaml, read_reference_yaml
    from diffmoe_ds.checkpoint.stream import Entry

    state, weights = read_reference(args.path, args.weights)
    path = args.reference_config or find_reference_yaml(args.path)
    found = None if path is None else read_reference_yaml(path)
    if found is not None:
        for option, value, configured in (
            ("--kind", args.kind, found["kind"]), ("--num-heads", args.num_heads, found["model"].get("num_heads")),
        ):  # fmt: skip
            if value not in (None, configured):
                raise ConfigError(f"{option} {value}: the model is configured by {path}, where it is {configured}.")
    guesses: list[str] = []
    try:
        if found is None:
            found, guesses = infer_reference(state, args.kind, args.num_heads)
        model = load_official(found, state)
    except (CheckpointError, ConfigError) as error:
        configuration = "" if path is None else f", configured by {path}"
        raise type(error)(f"{args.path}{configuration}: {error}") from None
    check_no_model(args.out)
    entries = [Entry(name, tuple(t.shape), torch.float32, [t.float()]) for name, t in model.state_dict().items()]
    written = write_model(args.out, entries, Description(model.config), weights, images=0)
    if path is not None:
        print(f"configuration of {path}")
    for guess in guesses:
        print(f"guessed: {guess}")
    if guesses:
        print("If a guess is wrong, import again with --reference-config and the YAML of the training.")
    for note in _import_notes(model, state, None if args.weights else weights):
        print(note)
    print(f"{args.path} -> {written} ({weights} weights)")


def _import_notes(model: DiT, state: dict[str, Tensor], taken: str | None) -> Iterator[str]:
    """Yield what the import has decided, in sentences.

    Args:
        model: the model.
        state: the reference's weights.
        taken: ``ema`` or ``raw``, if the user has not said which weights to take.
    """
    if taken == "raw":
        yield (
            "The file does not say that its weights are averaged, so they count as raw; if it holds averaged weights "
            "only, pass --weights ema."
        )
    config = model.config
    if len(state["final_layer.linear.weight"]) > len(model.final_layer.linear.weight):
        channels = counted(config.model.in_channels, "channel")
        yield f"Dropped the output's {channels} for the variance, which flow models do not use."
    if config.inference_choices[0] == "per_token":
        yield "The default routing is per_token; for the reference's numbers, pass --routing dynamic to sample."


def _checkpoint(path: Path) -> CheckpointReader:
    from diffmoe_ds.checkpoint.load import CheckpointReader
    from diffmoe_ds.checkpoint.verify import newest_valid

    found = newest_valid(path, full=True)
    if found is None:
        raise CheckpointError(f"{path}: not a checkpoint or run directory.")
    return CheckpointReader(found)
