"""``diffmoe checkpoint``: look into checkpoints and turn them into something else, without any rank."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffmoe_ds.errors import CheckpointError

EXAMPLES = """examples:
  diffmoe checkpoint inspect runs/fashion
  diffmoe checkpoint export runs/fashion --out exported
  diffmoe checkpoint reshard runs/fashion --world 24 --ep 8 --out runs/moved/checkpoints/images_000000030016
  diffmoe checkpoint import-official DiffMoE-L-E8.pt --out imported
  diffmoe sample --checkpoint exported --out samples
"""


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of ``diffmoe checkpoint``."""
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")

    def command(name: str, text: str, act: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(act=act)
        return sub

    inspect = command("inspect", "print what a checkpoint, a run directory or an exported model holds", _inspect)
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    inspect.add_argument("--full", action="store_true", help="check every byte, not the sizes only")

    reshard = command(
        "reshard", "rewrite a checkpoint as other ranks would keep it (resuming does not need it)", _reshard
    )
    reshard.add_argument("path", type=Path, help="a checkpoint or a run directory")
    reshard.add_argument("--world", type=int, required=True, metavar="W", help="number of ranks")
    reshard.add_argument("--ep", type=int, default=1, metavar="P", help="expert-parallel size (default: %(default)s)")
    reshard.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint")

    export = command("export", "write one model.safetensors and a config.json, for sampling and fine-tuning", _export)
    export.add_argument("path", type=Path, help="a checkpoint or a run directory")
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: %(default)s")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")

    official = command("import-official", "turn the reference's .pt file into an exported model", _import)
    official.add_argument("path", type=Path)
    official.add_argument("--out", type=Path, required=True, metavar="DIR")
    official.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: %(default)s")
    official.add_argument(
        "--kind", choices=("dense", "tc", "ec", "diffmoe"), help="default: what the weights look like"
    )
    official.add_argument("--num-heads", type=int, metavar="N", help="default: that of the published size")


def checkpoint_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe checkpoint``."""
    args.act(args)


def _inspect(args: argparse.Namespace) -> None:
    from diffmoe_ds.checkpoint.inspect import describe, readable

    found = describe(args.path, full=args.full)
    print(json.dumps(found, indent=1) if args.json else readable(found))
    broken = [entry for entry in found["checkpoints"] if entry["problem"]]
    if broken and len(broken) == len(found["checkpoints"]):
        raise CheckpointError(f"{args.path}: holds no valid checkpoint.")


def _reshard(args: argparse.Namespace) -> None:
    from diffmoe_ds.checkpoint.reshard import reshard
    from diffmoe_ds.topology import check_world

    check_world("--world", args.world)
    reader = _checkpoint(args.path)
    reshard(reader, args.out, args.world, args.ep)
    print(f"{reader.path} is now also {args.out}: {args.world} rank(s), EP {args.ep}")


def _export(args: argparse.Namespace) -> None:
    import torch

    from diffmoe_ds.checkpoint.export import export

    reader = _checkpoint(args.path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    print(f"{args.weights} weights of {reader.path} in {export(reader, args.weights, args.out, dtype)}")


def _import(args: argparse.Namespace) -> None:
    import torch

    from diffmoe_ds.checkpoint.export import write_model
    from diffmoe_ds.checkpoint.reference import infer_official, load_official, read_official
    from diffmoe_ds.checkpoint.stream import Entry

    state = read_official(args.path, args.weights)
    try:
        model = load_official(infer_official(state, args.kind, args.num_heads), state)
    except CheckpointError as error:
        raise CheckpointError(f"{args.path}: {error}") from None
    entries = [Entry(name, tuple(t.shape), torch.float32, [t.float()]) for name, t in model.state_dict().items()]
    print(f"{args.path} is now {write_model(args.out, entries, model.config, args.weights, images=0)}")


def _checkpoint(path: Path) -> Any:
    from diffmoe_ds.checkpoint.load import CheckpointReader
    from diffmoe_ds.checkpoint.verify import newest_valid

    found = newest_valid(path, full=True)
    if found is None:
        raise CheckpointError(f"{path}: is no checkpoint and no run directory with one.")
    return CheckpointReader(found)
