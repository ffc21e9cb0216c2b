"""The comparison of training with and without REPA: what it runs, prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import repa, strategies
from diffmoe_ds import cli
from diffmoe_ds.config.load import load_config


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that starts the benchmark with options, and the commands that it ran."""
    commands: list[list[str]] = []

    def run_diffmoe(command, jobs, **streams):
        commands.append(command)
        args = cli._parser().parse_args(command)
        config = load_config(args.config, args.overrides)
        gain = 1.5 * bool(config.loss.repa_weight)
        directory = Path(args.run_dir)
        directory.mkdir(parents=True)
        with (directory / "validation.jsonl").open("w") as file:
            for images in (10_000, 20_000):
                metrics = {"frechet": 100 - images / 1000 - gain + config.run.seed}
                row = {"images": images, "validation_loss": 0.2 - images / 1e6, "metrics": metrics}
                file.write(json.dumps(row) + "\n")

    for name in ("train", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.setattr(strategies, "run_diffmoe", run_diffmoe)
    places = [
        "--data",
        str(tmp_path / "data"),
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
    ]
    return lambda *options: repa.main([*places, *options]), commands


def test_the_table_and_the_curves_show_every_seed(tmp_path, capsys, started):
    start, commands = started
    figure = tmp_path / "repa.png"
    assert start("--figure", str(figure)) == 0
    printed = capsys.readouterr().out
    assert "| 10,000 | 91.00 | 89.50 | -1.50, -1.50, -1.50 | 0.1900 | 0.1900 | +0.0000, +0.0000, +0.0000 |" in printed
    assert "| 20,000 | 81.00 | 79.50 | -1.50, -1.50, -1.50 | 0.1800 | 0.1800 | +0.0000, +0.0000, +0.0000 |" in printed
    assert figure.read_bytes().startswith(b"\x89PNG") and len(commands) == 6
    assert sum("loss.repa_weight=0.5" in command for command in commands) == 3
    assert start() == 0 and len(commands) == 6, "existing results are not measured again"
    assert start("--seeds", "0", "7") == 0 and len(commands) == 8


def test_mistakes_are_named(tmp_path, capsys, started):
    start, _ = started
    assert start("--seeds", "0") == 0
    for options, code, message in (
        (["--jobs", "0"], 2, "--jobs must be positive, got 0"),
        (["--seeds", "-1"], 2, "--seeds must not be negative, got -1"),
        (["--data", str(tmp_path)], 4, "has no directory train; see"),
        (["--seeds", "0", "--set", "optimizer.lr=0.5"], 2, "set is [], but ['optimizer.lr=0.5'] was requested"),
    ):
        assert start(*options) == code
        assert message in capsys.readouterr().err
    (tmp_path / "results" / "with-seed0.json").write_text("[]")
    assert start("--seeds", "0") == 4
    assert "with-seed0.json: not a result of benchmarks.repa" in capsys.readouterr().err
