"""Training with and without representation alignment (REPA, arXiv 2410.06940): held-out loss and Frechet distance.

    python -m benchmarks.repa --data fashion-repa --runs runs/repa --figure docs/repa.png

trains the model of `benchmarks/strategies.yaml` with and without the alignment loss, with the same seeds, evaluates it
every 10,000 images, and writes one file per run to ``--results``. Existing results are skipped and interrupted training
resumes, so the same command continues the work. See `benchmarks/README.md` for how to prepare the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare import machine_facts, progress
from benchmarks.strategies import add_study_options, check_seeds, train_logged
from benchmarks.strategies_report import COLOUR, GREY, METRICS, two_panels
from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.files import replacing, write_json

RESULTS = Path(__file__).parent / "results" / "repa"
SETTINGS = (
    "model.in_channels=3", "data.shuffle=feistel", "run.total_images=40_000", "eval.every_images=10_000",
    "eval.metrics=[frechet]", "sample.steps=12", "sample.cfg_scale=1",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "without": (),
    "with": ("loss.repa_weight=0.5", "loss.repa_block=2", "loss.repa_hidden=256"),
}
"""``--set`` values of the compared runs; the paper aligns a block in the first half."""
COLOURS = {"without": GREY, "with": COLOUR}

Curves = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
"""Variant -> seed -> the evaluations of that run, in the order of training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser, "directory with the prepared train and test", RESULTS, [0, 1, 2])
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG file for the curves (default: none)")
    parser.set_defaults(run=run, argv=list(sys.argv[1:] if argv is None else argv))
    return run_command(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Train what is missing, print the table and draw the curves.

    Raises:
        ConfigError: an option is invalid.
        DataError: the data is missing, or a result is damaged.
        DiffMoEError: a training failed; its log says why.
    """
    require_positive(args, "jobs")
    check_seeds(args.seeds)
    for name in ("train", "test"):
        if not (args.data / name).is_dir():
            raise DataError(f"--data {args.data}: has no directory {name}; see benchmarks/README.md")
    jobs = [(name, seed) for seed in args.seeds for name in VARIANTS if not _result(args, name, seed).is_file()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(args, *job), jobs))
    curves = {
        name: {seed: read_result(_result(args, name, seed), args.set) for seed in args.seeds} for name in VARIANTS
    }
    print("\n".join(table(curves)))
    if args.figure is not None:
        draw(curves, args.figure)


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train a model, or finish its training, and write its evaluations."""
    progress(f"train {name} alignment, seed {seed}")
    directory = args.runs / name / f"seed{seed}"
    data = [f"data.path={args.data / 'train'}", f"data.validation_path={args.data / 'test'}", f"run.seed={seed}"]
    train_logged(directory, [*data, *SETTINGS, *VARIANTS[name], *args.set], args.jobs)
    rows = [json.loads(line) for line in (directory / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [
        {"images": row["images"], "validation_loss": row["validation_loss"], "frechet": row["metrics"]["frechet"]}
        for row in rows
    ]
    path = _result(args, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = machine_facts("benchmarks.repa", args.argv)
    write_json(path, {"variant": name, "seed": seed, "evaluations": points, "set": args.set, "machine": facts})


def _result(args: argparse.Namespace, name: str, seed: int) -> Path:
    path: Path = args.results / f"{name}-seed{seed}.json"
    return path


def read_result(path: Path, overrides: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """Return the evaluations of a run.

    Raises:
        ConfigError: it had other overrides of the recipe.
        DataError: the file is damaged.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = result["evaluations"]
        if not rows or not all(row.keys() >= {"images", *METRICS} for row in rows):
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: not a result of benchmarks.repa; remove it to measure it again.") from None
    if result["set"] != list(overrides):
        raise ConfigError(f"{path}: set is {result['set']}, but {overrides} was requested; use another --results.")
    return rows


def table(curves: Curves) -> list[str]:
    """Return the lines of a Markdown table: the means over the seeds, and the difference of each seed."""
    titles = [f"{label}, {name}" for label in METRICS.values() for name in (*VARIANTS, "differences")]
    lines = [f"| images | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    first = next(iter(curves["with"].values()))
    for index, point in enumerate(first):
        cells = [f"{point['images']:,}"]
        for metric, digits in zip(METRICS, (2, 4), strict=True):
            values = {name: [rows[index][metric] for rows in curves[name].values()] for name in VARIANTS}
            differences = [after - before for before, after in zip(values["without"], values["with"], strict=True)]
            cells += [f"{statistics.fmean(values[name]):.{digits}f}" for name in VARIANTS]
            cells.append(", ".join(f"{value:+.{digits}f}" for value in differences))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(curves: Curves, path: Path) -> None:
    """Draw both metrics against the images of training, every seed as a line."""
    import matplotlib

    matplotlib.use("Agg")
    figure, panels = two_panels("training images")
    for axes, metric in zip(panels, METRICS, strict=True):
        for name, seeds in curves.items():
            for number, rows in enumerate(seeds.values()):
                label = f"{name} alignment" if number == 0 else None
                images, values = [row["images"] for row in rows], [row[metric] for row in rows]
                axes.plot(images, values, "o-", color=COLOURS[name], markersize=4, linewidth=1.5, label=label)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
