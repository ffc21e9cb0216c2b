"""The paper's comparison of strategies in miniature (arXiv 2503.14487, table 2): train, evaluate, keep every result.

    python -m benchmarks.strategies --data fashion --runs runs/strategies

trains each model and evaluates it with each inference rule, with three seeds each, and writes one JSON file per result
to ``--results``. Existing results are skipped and interrupted training resumes, so the same command continues the work.
``python -m benchmarks.strategies_report`` draws the figures and prints the tables. See `benchmarks/README.md` for how
to build the data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import machine_facts, progress
from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.config.load import config_to_dict, differences, load_config
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError, DataError, DiffMoEError
from diffmoe_ds.files import write_json
from diffmoe_ds.planning.parameters import count_parameters

RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = Path(__file__).parent / "results" / "strategies"
BATCH = 50
"""Images per batch, which compete under `static` and `dynamic`."""

DENSE = ("model.name=Dense-tiny", "routing.kind=dense")
MODELS: dict[str, tuple[str, ...]] = {
    "TC": ("routing.kind=token_choice",),
    "dense": DENSE,
    "EC": ("routing.kind=expert_choice",),
    "DiffMoE": (),
    "dense-1.5x": (*DENSE, "model.depth=6"),
    "dense-3x": (*DENSE, "model.depth=6", "model.hidden_size=140"),
    **{f"pool-{images}": (f"routing.pool_images={images}",) for images in (1, 2, 4, 8)},
}
"""``--set`` values of each model. Dense models with 1.5x (3x) the activated parameters are deeper (and wider)."""


@dataclass(frozen=True)
class Strategy:
    """A model and how it is sampled."""

    model: str
    """A key of `MODELS`."""
    routing: str
    """The inference rule."""
    options: tuple[str, ...] = ()
    """Further options of ``diffmoe evaluate``."""


STRATEGIES: dict[str, Strategy] = {
    "TC": Strategy("TC", "static"),
    "dense": Strategy("dense", "static"),
    "EC-static": Strategy("EC", "static"),
    "EC-dynamic": Strategy("EC", "dynamic"),
    "DiffMoE-static": Strategy("DiffMoE", "static"),
    "DiffMoE-dynamic": Strategy("DiffMoE", "dynamic"),
    "DiffMoE-per_token": Strategy("DiffMoE", "per_token"),
    "dense-1.5x": Strategy("dense-1.5x", "static"),
    "dense-3x": Strategy("dense-3x", "static"),
    **{f"{model}-per_token": Strategy(model, "per_token") for model in MODELS if model.startswith("pool-")},
    **{f"DiffMoE-dynamic-{n}": Strategy("DiffMoE", "dynamic", ("--batch-size", str(n))) for n in (5, 500)},
    **{f"DiffMoE-capacity-{c:g}": Strategy("DiffMoE", "per_token", ("--capacity", str(c))) for c in (0.25, 0.5, 2, 4)},
}
"""The rows of the table, then those of the three figures: sizes of the pool, batches of `dynamic`, and capacities."""
REQUIRED = {
    "strategy", "seed", "params_activated", "params_total", "capacity", "frechet", "precision", "recall",
    "validation_loss", "validation_loss_by_noise_level",
}  # fmt: skip
"""Keys of every result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_study_options(parser, "directory with train.tar and test.tar", RESULTS, [0, 1, 2])
    add("--strategies", nargs="+", default=list(STRATEGIES), metavar="NAME", help="default: all")
    add("--num-images", type=int, default=2000, metavar="N", help="images to generate (default: %(default)s)")
    add("--steps", type=int, default=25, metavar="K", help="Euler steps (default: %(default)s)")
    parser.set_defaults(run=run, argv=list(sys.argv[1:] if argv is None else argv))
    return run_command(parser.parse_args(argv))


def add_study_options(parser: argparse.ArgumentParser, data: str, results: Path, seeds: Sequence[int]) -> None:
    """Add the options of every comparison of trainings.

    Args:
        parser: the benchmark's parser.
        data: what ``--data`` must hold, for the help.
        results: the default directory for the results.
        seeds: the default seeds of training.
    """
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help=data)
    add("--runs", type=Path, required=True, metavar="DIR", help="parent directory of the runs, about 60 MB each")
    add("--results", type=Path, default=results, metavar="DIR", help="directory for the results (default: %(default)s)")
    shown = " ".join(map(str, seeds))
    add("--seeds", type=int, nargs="+", default=seeds, metavar="S", help=f"seeds of training (default: {shown})")
    add("--jobs", type=int, default=2, metavar="J", help="number of parallel processes (default: %(default)s)")
    add("--set", nargs="+", default=[], metavar="a.b=c", help="further overrides of the recipe, such as a shorter run")


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds of training.

    Raises:
        ConfigError: one is negative.
    """
    for seed in seeds:
        if seed < 0:
            raise ConfigError(f"--seeds must not be negative, got {seed}.")


def run(args: argparse.Namespace) -> None:
    """Train and evaluate the missing models and strategies.

    Raises:
        ConfigError: an option is invalid.
        DataError: the data is missing.
        DiffMoEError: a command failed; its output says why.
    """
    require_positive(args, "num_images", "steps", "jobs")
    check_seeds(args.seeds)
    for name in args.strategies:
        if name not in STRATEGIES:
            raise ConfigError(unknown("--strategies", name, STRATEGIES))
    for name in ("train.tar", "test.tar"):
        if not (args.data / name).is_file():
            raise DataError(f"--data {args.data}: has no {name}; see benchmarks/README.md")
    missing = [(name, seed) for seed in args.seeds for name in args.strategies if not _is_finished(args, name, seed)]
    models = list(dict.fromkeys((STRATEGIES[name].model, seed) for name, seed in missing))
    for model, seed in models:
        _require_same_recipe(args, model, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(args, *job), models))
        if missing and not _reference(args).is_file():
            save_reference(args, *models[0])
        list(pool.map(lambda job: evaluate(args, *job), missing))


def _is_finished(args: argparse.Namespace, name: str, seed: int) -> bool:
    """Return whether a result exists.

    Raises:
        ConfigError: it was measured with other settings.
    """
    path = _result(args, name, seed)
    if not path.is_file():
        return False
    result = read_result(path)
    images = load_config(str(RECIPE), args.set).run.total_images
    for key, value in {"n": args.num_images, "steps": args.steps, "set": args.set, "train_images": images}.items():
        if result.get(key) != value:
            raise ConfigError(f"{path}: {key} is {result.get(key)}, but {value} was requested; use another --results.")
    return True


def read_result(path: Path) -> dict[str, Any]:
    """Read the file of a result.

    Raises:
        DataError: it is damaged, or is the result of another strategy or seed than its name says.
    """
    try:
        # the committed results are older than `set`
        result: dict[str, Any] = {"set": [], **json.loads(path.read_text(encoding="utf-8"))}
        if not result.keys() >= REQUIRED or path.stem != f"{result['strategy']}-seed{result['seed']}":
            raise ValueError
        if result["strategy"] not in STRATEGIES:
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{path}: not a result of benchmarks.strategies; remove it to measure it again.") from None
    return result


def _require_same_recipe(args: argparse.Namespace, model: str, seed: int) -> None:
    """Check that a run, if it exists, was started with the requested recipe; training would continue or keep it.

    Raises:
        ConfigError: it was not.
    """
    resolved = args.runs / model / f"seed{seed}" / "resolved.yaml"
    if not resolved.is_file():
        return
    started, requested = config_to_dict(load_config(str(resolved))), config_to_dict(_recipe(args, model, seed))
    for key, (before, now) in differences(started, requested).items():
        raise ConfigError(f"{resolved}: {key} is {before}, but {now} was requested; use another --runs.")


def _chosen(args: argparse.Namespace, model: str, seed: int) -> list[str]:
    """Return the ``--set`` values of a training."""
    return [f"data.path={args.data / 'train.tar'}", f"run.seed={seed}", *MODELS[model], *args.set]


def _recipe(args: argparse.Namespace, model: str, seed: int) -> Config:
    return load_config(str(RECIPE), _chosen(args, model, seed))


def train(args: argparse.Namespace, model: str, seed: int) -> None:
    """Train a model, or finish its training."""
    progress(f"train {model}, seed {seed}")
    train_logged(args.runs / model / f"seed{seed}", _chosen(args, model, seed), args.jobs)


def train_logged(directory: Path, overrides: Sequence[str], jobs: int) -> None:
    """Train with the recipe in a run directory, with the output in a file next to it.

    Raises:
        DiffMoEError: training failed; the message names the log.
    """
    log = directory.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["train", "--config", str(RECIPE), "--run-dir", str(directory), "--set", *overrides]
    with log.open("a", encoding="utf-8") as file:
        try:
            run_diffmoe(command, jobs, stdout=file, stderr=subprocess.STDOUT)
        except DiffMoEError as error:
            raise DiffMoEError(f"{error}; see {log}") from None


def save_reference(args: argparse.Namespace, model: str, seed: int) -> None:
    """Compute the features of the test images once; the command needs a model, which generates two images."""
    progress("features of the test images")
    command = [
        "evaluate", "--checkpoint", str(args.runs / model / f"seed{seed}"), "--num-images", "2", "--steps", "1",
        "--reference", str(args.data / "test.tar"), "--save-reference", str(_reference(args)), "--json",
    ]  # fmt: skip
    run_diffmoe(command, 1, stdout=subprocess.PIPE)


def evaluate(args: argparse.Namespace, name: str, seed: int) -> None:
    """Evaluate a strategy and write its result."""
    progress(f"evaluate {name}, seed {seed}")
    strategy = STRATEGIES[name]
    command = [
        "evaluate", "--checkpoint", str(args.runs / strategy.model / f"seed{seed}"), "--reference",
        str(_reference(args)), "--validation", str(args.data / "test.tar"), "--num-images", str(args.num_images),
        "--steps", str(args.steps), "--batch-size", str(BATCH), "--routing", strategy.routing, *strategy.options,
        "--json",
    ]  # fmt: skip
    printed = run_diffmoe(command, args.jobs, stdout=subprocess.PIPE)
    metrics: Mapping[str, Any] = json.loads(printed.splitlines()[-1])
    config = _recipe(args, strategy.model, seed)
    counts = count_parameters(config)
    result = {
        "strategy": name, "model": strategy.model, "routing": strategy.routing, "seed": seed,
        "params_activated": counts.activated, "params_total": counts.total,
        "train_images": config.run.total_images, "steps": args.steps, "set": args.set, **metrics,
        "machine": machine_facts("benchmarks.strategies", args.argv),
    }  # fmt: skip
    path = _result(args, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def _reference(args: argparse.Namespace) -> Path:
    """Return the file with the features of the test images; its name depends on what test.tar contains."""
    digest = hashlib.sha256((args.data / "test.tar").read_bytes()).hexdigest()
    path: Path = args.runs / f"reference-{digest[:8]}.npz"
    return path


def _result(args: argparse.Namespace, name: str, seed: int) -> Path:
    path: Path = args.results / f"{name}-seed{seed}.json"
    return path


def run_diffmoe(command: Sequence[str], jobs: int, **streams: Any) -> str:
    """Run ``diffmoe`` with its share of the cores, and return its captured output, if any.

    Raises:
        DiffMoEError: the command failed.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    finished = subprocess.run(
        [sys.executable, "-m", "diffmoe_ds", *command], text=True, check=False, env=env, **streams
    )
    if finished.returncode:
        raise DiffMoEError(f"diffmoe {' '.join(command)}: exit code {finished.returncode}")
    return finished.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
