"""DeepSpeed's other monitors: CSV files and Weights & Biases get the scalars of TensorBoard."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from diffmoe_ds.cli import main
from tests.helpers.training import read_metrics, training_arguments, write_json


def train(folder: Path, *overrides: str, code: int = 0, **sections: object) -> None:
    config = write_json(folder / "ds.json", ep=1, zero=0, **sections)
    assert main(["train", *training_arguments(config, folder / "run", *overrides)]) == code


def values(path: Path) -> list[tuple[int, float]]:
    """Return the rows of a CSV file as (images, value)."""
    with path.open() as file:
        return [(int(images), float(value)) for images, value in list(csv.reader(file))[1:]]


def test_csv_files(tmp_path):
    train(tmp_path, "run.total_images=32", csv_monitor={"enabled": True})
    rows = read_metrics(tmp_path / "run")
    folder = tmp_path / "run" / "csv"
    assert values(folder / "loss_loss.csv") == pytest.approx([(row["images"], row["loss"]) for row in rows])
    assert len(values(folder / "load_per_expert_block_01_expert_03.csv")) == len(rows)
    train(tmp_path, "run.total_images=48", csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "x"})
    assert [images for images, _ in values(tmp_path / "x" / "loss_loss.csv")] == [48]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    train(tmp_path, "run.total_images=32", wandb={"enabled": True, "group": "g"})
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert not (tmp_path / "wandb").exists() and "WANDB_DIR" not in os.environ
    data = b"".join(path.read_bytes() for path in run.glob("*.wandb"))
    assert b"loss/diffusion_loss" in data and b"load_per_expert/block_01/expert_03" in data


def test_nobody_is_logged_in(tmp_path, capsys, monkeypatch):
    """wandb would fail only after the run directory has been written."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    import wandb

    wandb.teardown()  # it remembers the mode of the test before
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    train(tmp_path, code=2, wandb={"enabled": True})
    assert "run `wandb login`, set WANDB_MODE=offline, or disable it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffmoe_ds.config.deepspeed_sections.find_spec", lambda name: None)
    train(tmp_path, code=2, wandb={"enabled": True})
    assert (
        "wandb.enabled needs wandb, which is not installed: pip install 'diffmoe_ds[wandb]'" in capsys.readouterr().err
    )
