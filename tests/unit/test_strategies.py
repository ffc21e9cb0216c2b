"""The comparison of strategies: its table of models, its statistics, and what it skips."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import scipy.stats

from benchmarks import strategies, strategies_report
from diffmoe_ds import cli
from diffmoe_ds.config.load import load_config
from diffmoe_ds.planning.parameters import count_parameters


def test_models_are_compared_at_equal_activated_parameters():
    configs = {name: load_config(str(strategies.RECIPE), list(chosen)) for name, chosen in strategies.MODELS.items()}
    counts = {name: count_parameters(config).activated for name, config in configs.items()}
    for name, activated in counts.items():
        larger = {"dense-1.5x": 1.5, "dense-3x": 3}.get(name, 1)
        assert activated / counts["dense"] == pytest.approx(larger, rel=0.05), name
    assert {strategy.model for strategy in strategies.STRATEGIES.values()} == set(configs)
    for strategy in strategies.STRATEGIES.values():
        assert strategy.routing in configs[strategy.model].inference_choices


def test_the_prediction_interval_holds_the_next_seed():
    """For many draws of three seeds, about 95% of the intervals contain a fourth."""
    rng = np.random.default_rng(0)
    values = rng.normal(10, 2, size=(2000, 4))
    inside = [
        found.low <= row[3] <= found.high for row in values for found in [strategies_report.summarize(row[:3].tolist())]
    ]
    assert statistics.fmean(inside) == pytest.approx(0.95, abs=0.015)
    alone = strategies_report.summarize([3.0])
    assert alone.mean == 3 and math.isnan(alone.low)


def test_differences_are_taken_seed_by_seed():
    """The interval of the mean difference is that of a paired t-test; a seed without a partner is left out."""
    better = {0: 1.0, 1: 1.5, 2: 1.1}
    results = {
        "dense": [result("dense", seed, frechet=100.0 * seed) for seed in (0, 1, 2, 3)],
        "DiffMoE-per_token": [
            result("DiffMoE-per_token", seed, frechet=100.0 * seed - gain) for seed, gain in better.items()
        ],
    }
    line = strategies_report.difference_table(results)[-1]
    low, high = scipy.stats.ttest_1samp([-gain for gain in better.values()], 0).confidence_interval()
    assert f"| -1.20 | {low:+.2f} to {high:+.2f} |" in line and line.endswith("| 3 |")


def result(name: str, seed: int, **changes: object) -> dict:
    strategy = strategies.STRATEGIES[name]
    return {
        "strategy": name, "model": strategy.model, "routing": strategy.routing, "seed": seed, "frechet": 20.0 + seed,
        "validation_loss": 0.3 + seed / 100, "params_activated": 600_000, "params_total": 1_100_000, "capacity": 1.0,
        "precision": 0.5, "recall": 0.4, "validation_loss_by_noise_level": [0.4, 0.2 + seed / 10], **changes,
    }  # fmt: skip


def test_the_report_shows_every_result(tmp_path, capsys):
    names = ["dense", "pool-1-per_token", "DiffMoE-per_token", "DiffMoE-dynamic", "DiffMoE-capacity-2"]
    for name in names:
        for seed in (0, 1):
            changes = {"capacity": None} if name == "dense" else {}
            (tmp_path / f"{name}-seed{seed}.json").write_text(json.dumps(result(name, seed, **changes)))
    assert strategies_report.main(["--results", str(tmp_path), "--figures", str(tmp_path)]) == 0
    strategy, difference, noise = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    ordered = sorted(names, key=list(strategies.STRATEGIES).index)
    assert [line.split("|")[1].strip() for line in strategy[2:]] == ordered
    assert "20.50 ± 0.71" in strategy[2] and "| 2 |" in strategy[2]
    assert noise[0] == "| noise level | 0.25 | 0.75 |" and noise[2] == "| dense | 0.4000 | 0.2500 |"
    assert "DiffMoE-per_token - dense | +0.00 | +0.00 to +0.00 |" in difference[-1]
    assert {path.name for path in tmp_path.glob("*.png")} == {"pool-size.png", "per-token.png", "capacity.png"}


def test_damaged_and_missing_results_are_named(tmp_path, capsys):
    assert strategies_report.main(["--results", str(tmp_path)]) == 4
    assert "no results; run python -m benchmarks.strategies first" in capsys.readouterr().err
    (tmp_path / "dense-seed0.json").write_text('{"strategy": "dense"}')
    assert strategies_report.main(["--results", str(tmp_path)]) == 4
    assert "dense-seed0.json: not a result" in capsys.readouterr().err


def test_finished_results_are_skipped_and_mistakes_are_named(tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tar", "test.tar"):
        (data / name).touch()
    commands = []

    def run(command, jobs, **streams):
        commands.append(command)
        cli._parser().parse_args(command)
        return 'a line\n{"frechet": 1.5, "n": 2000}\n'

    monkeypatch.setattr(strategies, "_diffmoe", run)
    results = tmp_path / "results"
    arguments = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--results", str(results), "--seeds", "0", "7"]
    chosen = [*arguments, "--strategies", "EC-static", "EC-dynamic"]
    (results).mkdir()
    measured = {"n": 2000, "steps": 25, "train_images": 100_000}
    (results / "EC-dynamic-seed7.json").write_text(json.dumps(result("EC-dynamic", 7, **measured)))
    assert strategies.main(chosen) == 0
    assert sorted(command[0] for command in commands) == ["evaluate"] * 4 + ["train"] * 2
    assert [command[0] for command in commands if "--save-reference" in command] == ["evaluate"]
    written = json.loads((results / "EC-static-seed7.json").read_text())
    assert written["frechet"] == 1.5 and written["seed"] == 7 and written["machine"]["command"].endswith("EC-dynamic")
    commands.clear()
    assert strategies.main(chosen) == 0 and not commands
    for options, message in (
        (["--strategies", "EC"], "did you mean"),
        (["--jobs", "0"], "--jobs must be positive, got 0"),
        (["--strategies", "EC-static", "--steps", "9"], "EC-static-seed0.json: steps is 25, but 9 was requested"),
        (["--data", str(tmp_path)], "has no train.tar; see"),
    ):
        assert strategies.main([*arguments, *options]) in (2, 4)
        assert message in capsys.readouterr().err
