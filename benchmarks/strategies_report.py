"""Tables and figures of `benchmarks/strategies.py`, from the available results.

    python -m benchmarks.strategies_report --figures docs

prints three tables in Markdown: every strategy with the mean and standard deviation over the training seeds and the 95%
prediction interval, in which the value of one more seed is expected; the differences between strategies, seed by seed;
and the validation loss by noise level.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.strategies import BATCH, RESULTS, STRATEGIES, read_result
from diffmoe_ds.cli import run_command
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""The results of every seed, by strategy."""

METRICS = {"frechet": "Frechet distance", "validation_loss": "validation loss"}
"""Metrics in the figures -> their names."""
POOLS: dict[float, str] = {**{n: f"pool-{n}-per_token" for n in (1, 2, 4, 8)}, 32: "DiffMoE-per_token"}
"""Images per pool -> strategy."""
DYNAMIC: dict[float, str] = {5: "DiffMoE-dynamic-5", BATCH: "DiffMoE-dynamic", 500: "DiffMoE-dynamic-500"}
"""Images per batch -> strategy."""
CAPACITIES = [name for name in STRATEGIES if name.startswith("DiffMoE-capacity") or name == "DiffMoE-per_token"]
"""One model with several numbers of experts per token."""
SETTINGS = ("n", "n_reference", "steps", "extractor", "train_images", "set")
"""Keys that all results must share."""
PAIRS = (
    ("DiffMoE-per_token", "DiffMoE-dynamic"),
    ("DiffMoE-per_token", "DiffMoE-static"),
    ("EC-dynamic", "EC-static"),
    ("DiffMoE-dynamic-5", "DiffMoE-dynamic"),
    ("DiffMoE-dynamic-500", "DiffMoE-dynamic"),
    *((name, "DiffMoE-per_token") for name in POOLS.values() if name != "DiffMoE-per_token"),
    *((name, "DiffMoE-per_token") for name in CAPACITIES if name != "DiffMoE-per_token"),
    *(("DiffMoE-per_token", name) for name in ("EC-static", "EC-dynamic", "TC", "dense", "dense-1.5x", "dense-3x")),
)
"""Strategies to compare seed by seed; most of the spread cancels between two inference rules of one model."""
COLOUR, GREY = "#1f5a99", "#8a8a8a"


class Summary(NamedTuple):
    """Statistics of a metric over the training seeds."""

    mean: float
    deviation: float
    """Standard deviation; NaN for one seed."""
    low: float
    """Lower end of the 95% prediction interval for one more seed."""
    high: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, draw the figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the results (default: %(default)s)")
    add("--figures", type=Path, metavar="DIR", help="existing directory for the figures (default: draw none)")
    parser.set_defaults(run=run)
    return run_command(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Print the tables and draw the figures.

    Raises:
        ConfigError: the directory for the figures does not exist.
        DataError: there are no results, one is damaged, or two were measured differently.
    """
    if args.figures is not None and not args.figures.is_dir():
        raise ConfigError(f"--figures {args.figures}: the directory does not exist.")
    results = read_results(args.results)
    print("\n".join([*table(results), "", *difference_table(results), "", *noise_table(results)]))
    if args.figures is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    for name, (compared, draw) in FIGURES.items():
        path = args.figures / f"{name}.png"
        if len([strategy for strategy in compared if strategy in results]) < 2:
            print(f"{path}: not drawn, because it compares strategies without results", file=sys.stderr)
            continue
        figure = draw(results)
        with replacing(path) as tmp:
            figure.savefig(tmp, format="png", dpi=150)


def read_results(directory: Path) -> Results:
    """Read the results, in the order of `STRATEGIES`, sorted by seed.

    Raises:
        DataError: there are none, one is damaged, or two were measured differently.
    """
    results = defaultdict(list)
    first: dict[str, tuple[object, Path]] = {}
    for path in sorted(directory.glob("*.json")):
        result = read_result(path)
        results[result["strategy"]].append(result)
        for key in SETTINGS:
            value = result.get(key)
            other, where = first.setdefault(key, (value, path))
            if value != other:
                raise DataError(f"{path}: cannot be compared: {key} is {value}, but {other} in {where.name}")
    if not results:
        raise DataError(f"--results {directory}: no results; run python -m benchmarks.strategies first")
    names = [name for name in STRATEGIES if name in results]
    return {name: sorted(results[name], key=lambda row: int(row["seed"])) for name in names}


def summarize(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and the 95% prediction interval, which assumes a normal distribution."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return Summary(mean, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values)
    reach = float(t.ppf(0.975, len(values) - 1)) * deviation * math.sqrt(1 + 1 / len(values))
    return Summary(mean, deviation, mean - reach, mean + reach)


# --------------------------------------------------------------------------------------------------------------- tables


def table(results: Results) -> list[str]:
    """Return the lines of a Markdown table with a row for each strategy."""
    lines = [
        "| strategy | activated / total parameters | experts per token | Frechet distance | 95% prediction interval | "
        "validation loss | 95% prediction interval | precision / recall | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        cells = [
            name,
            f"{rows[0]['params_activated'] / 1e6:.2f} M / {rows[0]['params_total'] / 1e6:.2f} M",
            f"{_capacity(rows):.2f}" if rows[0].get("capacity") is not None else "",
            *_cells(rows, "frechet", 2),
            *_cells(rows, "validation_loss", 4),
            f"{statistics.fmean(row['precision'] for row in rows):.3f} / "
            f"{statistics.fmean(row['recall'] for row in rows):.3f}",
            str(len(rows)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _capacity(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the measured experts per token, averaged over the seeds."""
    return statistics.fmean(row["capacity"] for row in rows)


def _cells(rows: Sequence[Mapping[str, Any]], metric: str, digits: int) -> tuple[str, str]:
    """Return the mean with its standard deviation, and the interval."""
    found = summarize([row[metric] for row in rows])
    if len(rows) < 2:
        return f"{found.mean:.{digits}f}", ""
    return (
        f"{found.mean:.{digits}f} ± {found.deviation:.{digits}f}",
        f"{found.low:.{digits}f} to {found.high:.{digits}f}",
    )


def difference_table(results: Results) -> list[str]:
    """Return the lines of a table with the mean of each difference of `PAIRS` and its 95% confidence interval."""
    lines = [
        "| difference | Frechet distance | 95% interval | validation loss | 95% interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for first, second in PAIRS:
        others = {row["seed"]: row for row in results.get(second, ())}
        pairs = [(row, others[row["seed"]]) for row in results.get(first, ()) if row["seed"] in others]
        if len(pairs) > 1:
            found = [
                cell
                for metric, digits in (("frechet", 2), ("validation_loss", 5))
                for cell in _difference_cells([one[metric] - other[metric] for one, other in pairs], digits)
            ]
            lines.append(f"| {first} - {second} | {' | '.join(found)} | {len(pairs)} |")
    return lines


def _difference_cells(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Return the mean and its confidence interval, which is shorter than the prediction interval."""
    found = summarize(values)
    reach = (found.high - found.mean) / math.sqrt(len(values) + 1)
    return f"{found.mean:+.{digits}f}", f"{found.mean - reach:+.{digits}f} to {found.mean + reach:+.{digits}f}"


def noise_table(results: Results) -> list[str]:
    """Return the lines of a table with the validation loss in each noise-level bin, averaged over the seeds."""
    bins = len(next(iter(results.values()))[0]["validation_loss_by_noise_level"])
    levels = [f"{(level + 0.5) / bins:.2f}" for level in range(bins)]
    lines = [f"| noise level | {' | '.join(levels)} |", f"|---|{'---|' * bins}"]
    for name, rows in results.items():
        losses = zip(*(row["validation_loss_by_noise_level"] for row in rows), strict=True)
        lines.append(f"| {name} | {' | '.join(f'{statistics.fmean(values):.4f}' for values in losses)} |")
    return lines


# -------------------------------------------------------------------------------------------------------------- figures


def draw_pools(results: Results) -> Figure:
    """Draw both metrics against the number of images per training pool."""
    figure, panels = two_panels("images per pool in training")
    for axes, metric in zip(panels, METRICS, strict=True):
        _curve(axes, results, POOLS, metric)
    return figure


def draw_rules(results: Results) -> Figure:
    """Draw both metrics of `dynamic` against the batch size, with `per_token`, which does not depend on it."""
    figure, panels = two_panels("images per batch")
    for axes, metric in zip(panels, METRICS, strict=True):
        _curve(axes, results, DYNAMIC, metric, label="dynamic")
        rows = results.get("DiffMoE-per_token", [])
        if rows:
            axes.axhline(summarize([row[metric] for row in rows]).mean, color=GREY, linestyle="--", label="per_token")
            for row in rows:
                axes.axhline(row[metric], color=GREY, linewidth=0.5, alpha=0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def draw_capacities(results: Results) -> Figure:
    """Draw both metrics against the measured number of experts per token."""
    figure, panels = two_panels("experts per token at inference (measured)")
    for axes, metric in zip(panels, METRICS, strict=True):
        measured = {_capacity(results[name]): name for name in CAPACITIES if name in results}
        _curve(axes, results, dict(sorted(measured.items())), metric)
    return figure


def two_panels(label: str) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with one panel for each of `METRICS`."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(METRICS), figsize=(9, 3.4), layout="constrained")
    for axes, title in zip(panels, METRICS.values(), strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
    return figure, panels


def _curve(axes: Axes, results: Results, strategies: Mapping[float, str], metric: str, label: str = "mean") -> None:
    """Draw the mean as a line, every seed as a dot, and a thin line through the dots of a seed.

    The mean is that of the seeds that all strategies have. The axis of the strategies' numbers is logarithmic.
    """
    from matplotlib.ticker import FixedLocator

    found = {
        x: {row["seed"]: row[metric] for row in results[name]} for x, name in strategies.items() if name in results
    }
    common = set.intersection(*map(set, found.values())) if found else set()
    for seed in sorted(common):
        axes.plot(list(found), [values[seed] for values in found.values()], color=COLOUR, linewidth=0.6, alpha=0.5)
    if common:
        means = [statistics.fmean(values[seed] for seed in common) for values in found.values()]
        axes.plot(list(found), means, color=COLOUR, linewidth=2, label=label)
    for x, values in found.items():
        axes.plot([x] * len(values), list(values.values()), "o", color=COLOUR, markersize=4, alpha=0.7)
    axes.set_xscale("log")
    axes.set_xticks(list(found), [f"{round(x, 2):g}" for x in found])
    axes.xaxis.set_minor_locator(FixedLocator([]))


FIGURES: dict[str, tuple[Iterable[str], Callable[[Results], Figure]]] = {
    "pool-size": (POOLS.values(), draw_pools),
    "per-token": (("DiffMoE-per_token", *DYNAMIC.values()), draw_rules),
    "capacity": (CAPACITIES, draw_capacities),
}
"""Name of each figure -> the strategies that it compares, and the function that draws it."""


if __name__ == "__main__":
    sys.exit(main())
