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
"""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffmoe bench``."""
    names = parser.add_subparsers(required=True, dest="name", metavar="data")
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


def bench_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe bench``."""
    for option in ("samples", "workers", "batch_size", "rounds"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(args, option)}, but it must be above 0.")
    from diffmoe_ds.bench.data import bench_data

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
