"""``diffmoe bench``: measurements that anyone can repeat; what they gave here is in ``benchmarks/``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe bench data
  diffmoe bench data --json --workers 2 --samples 20000
  diffmoe bench checkpoint --megabytes 1000
"""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffmoe bench``."""
    names = parser.add_subparsers(required=True, dest="name", metavar="data|checkpoint")
    data = names.add_parser("data", help="the loader", description="The loader beside WebDataset's and torch's.")
    add = data.add_argument
    add("--samples", type=int, default=20_000, metavar="N", help="latents of the set (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes of each opponent (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="B", help="default: %(default)s")
    add(
        "--rounds", type=int, default=5, metavar="R", help="alternating rounds, of which medians (default: %(default)s)"
    )
    add("--memory-samples", type=int, default=200_000, metavar="N", help="read for memory (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="where the sets are made (default: a temporary directory)")
    add("--json", action="store_true", help="print one object instead of lines")
    data.set_defaults(bench=_data, positive=("samples", "workers", "batch_size", "rounds"))

    text = "Saving and loading beside torch.save, torch's distributed checkpoint and DeepSpeed's decoupled writer."
    checkpoint = names.add_parser("checkpoint", help="saving and loading", description=text)
    add = checkpoint.add_argument
    add("--megabytes", type=int, default=500, metavar="N", help="size of a checkpoint (default: %(default)s)")
    add(
        "--rounds", type=int, default=5, metavar="R", help="alternating rounds, of which medians (default: %(default)s)"
    )
    add("--folder", type=Path, metavar="DIR", help="on the disk to measure (default: a temporary directory)")
    add("--json", action="store_true", help="print one object instead of lines")
    checkpoint.set_defaults(bench=_checkpoint, positive=("megabytes", "rounds"))


def bench_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe bench``."""
    for option in args.positive:
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(args, option)}, but it must be above 0.")
    if args.folder is not None and not args.folder.is_dir():
        raise ConfigError(f"--folder is {args.folder}, which is no directory; make it first, or leave --folder out.")
    args.bench(args)


def _checkpoint(args: argparse.Namespace) -> None:
    from diffmoe_ds.bench.checkpoint import bench_checkpoint

    report = bench_checkpoint(megabytes=args.megabytes, rounds=args.rounds, folder=args.folder)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['megabytes']:,.0f} MB, medians of {report['rounds']} rounds")
    units = {"pause_s": "s that the loop waits", "save_mb_per_s": "MB/s saved", "load_mb_per_s": "MB/s loaded"}
    for name, row in report["ways"].items():
        print(
            f"  {name:<28}" + "".join(f" {row[key]:>10.3f} {unit}," for key, unit in units.items() if key in row)[:-1]
        )
    for name, ratio in report["ratios"].items():
        print(f"  {name:<44} {ratio:.2f}")


def _data(args: argparse.Namespace) -> None:
    from diffmoe_ds.bench.data import MEASURED_BATCHES, WARM_UP_BATCHES, bench_data

    needed = (WARM_UP_BATCHES + MEASURED_BATCHES) * args.batch_size
    if args.samples < needed:
        raise ConfigError(
            f"--samples is {args.samples}, but with --batch-size {args.batch_size} it must be at least {needed}: "
            f"{WARM_UP_BATCHES} batches to warm up and {MEASURED_BATCHES} to measure."
        )
    report = bench_data(
        samples=args.samples,
        workers=args.workers,
        batch_size=args.batch_size,
        rounds=args.rounds,
        memory_samples=args.memory_samples,
        folder=args.folder,
    )
    print(json.dumps(report) if args.json else _lines(report))


def _lines(report: dict[str, Any]) -> str:
    lines = [f"{report['samples']:,} latents 4x32x32 with mirror, batches of {report['batch_size']}, "
             f"{report['workers']} worker(s), medians of {report['rounds']} rounds"]  # fmt: skip
    for name, row in report["loaders"].items():
        lines.append(f"  {name:<34} {row['samples_per_s']:>9,.0f} samples/s {row['mb_per_s']:>8.1f} MB/s")
    lines += [f"  {name:<34} {value:.2f}x" for name, value in report["ratios"].items()]
    memory = report["memory"]
    lines.append(
        f"  memory of the loader's processes over {memory['samples']:,} samples: {memory['first_mb']:.1f} MB after the "
        f"first tenth, {memory['last_mb']:.1f} MB at the end, {memory['peak_mb']:.1f} MB at most"
    )
    return "\n".join(lines)
