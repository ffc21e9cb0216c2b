"""The comparison of strategies: its table of models, its statistics, and what it skips."""

from __future__ import annotations

import argparse
import json
import math
import statistics

import numpy as np
import pytest
import scipy.stats

from benchmarks import strategies, strategies_report
from diffmoe_ds import cli
from diffmoe_ds.config.load import dump_config, load_config
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
        "precision": 0.5, "recall": 0.4, "validation_loss_by_noise_level": [0.4, 0.2 + seed / 10], "n": 2000,
        "steps": 25, "train_images": 100_000, **changes,
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
    (tmp_path / "dense-seed0.json").write_text(json.dumps(result("dense", 0)))
    assert strategies_report.main(["--results", str(tmp_path), "--figures", str(tmp_path / "none")]) == 2
    assert "none: the directory does not exist" in capsys.readouterr().err


def test_results_that_were_measured_differently_are_not_averaged(tmp_path, capsys):
    for seed, changes in ((0, {}), (1, {"set": []}), (2, {"n": 20})):
        (tmp_path / f"TC-seed{seed}.json").write_text(json.dumps(result("TC", seed, **changes)))
    assert strategies_report.main(["--results", str(tmp_path)]) == 4
    assert "TC-seed2.json: cannot be compared: n is 20, but 2000 in TC-seed0.json" in capsys.readouterr().err
    (tmp_path / "TC-seed2.json").unlink()
    (tmp_path / "pool-size.png").write_bytes(b"earlier")
    assert strategies_report.main(["--results", str(tmp_path), "--figures", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("not drawn") == 3
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == {"pool-size.png": b"earlier"}


@pytest.mark.parametrize(
    "content",
    ['{"strategy": "dense"}', '{"strategy": "dense", "se', "[]", json.dumps(result("dense", 1)), "\xff"],
    ids=["keys", "truncated", "list", "copy", "bytes"],
)
def test_a_file_that_is_no_result_is_refused_by_both_scripts(tmp_path, capsys, content):
    """A copy under another name would count as one more seed."""
    (tmp_path / "dense-seed0.json").write_bytes(content.encode("latin-1"))
    assert strategies_report.main(["--results", str(tmp_path)]) == 4
    assert "dense-seed0.json: not a result" in capsys.readouterr().err
    for name in ("train.tar", "test.tar"):
        (tmp_path / name).touch()
    arguments = ["--data", str(tmp_path), "--runs", str(tmp_path), "--results", str(tmp_path)]
    assert strategies.main([*arguments, "--strategies", "dense", "--seeds", "0"]) == 4
    assert "dense-seed0.json: not a result" in capsys.readouterr().err


def test_a_run_with_another_recipe_or_data_is_not_evaluated_in_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(strategies, "run_diffmoe", lambda *arguments, **streams: "{}")
    run, results = tmp_path / "runs" / "dense" / "seed0", tmp_path / "results"
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        for split in ("train.tar", "test.tar"):
            (tmp_path / name / split).write_text(name)
    chosen = [*strategies.MODELS["dense"], f"data.path={tmp_path / 'data' / 'train.tar'}", "run.seed=0"]
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text(dump_config(load_config(str(strategies.RECIPE), chosen)))

    def start(*options: str, data: str = "data") -> int:
        places = ["--data", str(tmp_path / data), "--runs", str(tmp_path / "runs"), "--results", str(results)]
        return strategies.main([*places, "--strategies", "dense", "--seeds", "0", *options])

    for options, data, message in (
        (["--set", "optimizer.lr=0.5"], "data", "optimizer.lr is 0.002, but 0.5 was requested; use another --runs"),
        (["--set", "run.total_images=64"], "data", "run.total_images is 100000, but 64 was requested"),
        ([], "other", "other/train.tar was requested; use another --runs"),
    ):
        assert start(*options, data=data) == 2
        assert message in capsys.readouterr().err
    assert start() == 0
    (results / "dense-seed0.json").write_text(json.dumps(result("dense", 0, set=["optimizer.lr=0.5"])))
    assert start() == 2
    assert "set is ['optimizer.lr=0.5'], but [] was requested; use another --results" in capsys.readouterr().err


def test_other_test_images_have_another_file_of_features(tmp_path):
    args = argparse.Namespace(data=tmp_path, runs=tmp_path)
    names = set()
    for content in ("one", "two", "one"):
        (tmp_path / "test.tar").write_text(content)
        names.add(strategies._reference(args).name)
    assert len(names) == 2


def test_finished_results_are_skipped_and_mistakes_are_named(tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tar", "test.tar"):
        (data / name).touch()
    commands = []

    def run(command, jobs, **streams):
        commands.append(command)
        cli._parser().parse_args(command)
        measured = dict.fromkeys(strategies.REQUIRED - {"strategy", "seed", "params_activated", "params_total"}, 1.5)
        return f"a line\n{json.dumps({**measured, 'n': 2000})}\n"

    monkeypatch.setattr(strategies, "run_diffmoe", run)
    results = tmp_path / "results"
    arguments = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--results", str(results), "--seeds", "0", "7"]
    chosen = [*arguments, "--strategies", "EC-static", "EC-dynamic"]
    (results).mkdir()
    (results / "EC-dynamic-seed7.json").write_text(json.dumps(result("EC-dynamic", 7)))
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
        (["--seeds", "-1"], "--seeds must not be negative, got -1"),
        (["--strategies", "EC-static", "--steps", "9"], "EC-static-seed0.json: steps is 25, but 9 was requested"),
        (["--data", str(tmp_path)], "has no train.tar; see"),
    ):
        assert strategies.main([*arguments, *options]) in (2, 4)
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert strategies.main([*arguments, "--strategies", "TC", "--set", "data.path=/nowhere"]) == 1
    assert f"exit code 4; see {tmp_path / 'runs' / 'TC' / 'seed0.log'}" in capsys.readouterr().err
