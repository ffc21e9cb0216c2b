"""Learning-rate schedules: those of the recipe, and adding or removing one when a run resumes."""

from __future__ import annotations

import json
import math

import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.config.deepspeed import resolve_deepspeed
from diffmoe_ds.config.load import load_config
from tests.helpers.training import read_metrics, training_arguments, write_json

LR = 1e-3
"""The learning rate of the tiny runs."""


def scheduler(*overrides: str, **raw: object) -> tuple[dict | None, str]:
    """Return the scheduler of a run of 10 steps of 16 images, and its notes."""
    config = load_config("fashion", ["run.total_images=160", "optimizer.lr=1e-3", *overrides])
    found = resolve_deepspeed({"train_batch_size": 16, **raw}, config, "ds.json", world=1, local_world=1, device="cpu")
    return found.json.get("scheduler"), "\n".join(found.notes)


def test_schedules_of_the_recipe():
    assert scheduler() == (None, scheduler()[1])
    warmup, notes = scheduler("optimizer.warmup_images=33")
    expected = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 3, "warmup_type": "linear"}
    assert warmup == {"type": "WarmupLR", "params": expected}
    assert f"scheduler: WarmupLR with {json.dumps(expected)}, from the recipe" in notes
    cosine, _ = scheduler("optimizer.schedule=cosine")
    expected = {"total_num_steps": 10, "warmup_num_steps": 1, "warmup_type": "linear", "cos_min_ratio": 0.0}
    assert cosine == {"type": "WarmupCosineLR", "params": expected}
    given = {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}
    found, notes = scheduler("optimizer.schedule=cosine", scheduler=given)
    assert found == given and "scheduler is that of ds.json, not the recipe's" in notes


@pytest.mark.slow
@pytest.mark.parametrize("zero", (0, 1))
def test_a_schedule_is_added_and_removed_when_a_run_resumes(tmp_path, capsys, zero):
    """Added, it goes on as if it had been there; removed, the learning rate is that of the recipe."""
    config, run = write_json(tmp_path / "ds.json", ep=1, zero=zero), tmp_path / "run"

    def train(images: int, *overrides: str) -> str:
        chosen = training_arguments(config, run, f"run.total_images={images}", *overrides)
        assert main(["train", *chosen]) == 0
        return capsys.readouterr().out

    schedule = ("optimizer.schedule=cosine", "optimizer.warmup_images=32")
    train(48)
    assert ", with a new learning-rate schedule: WarmupCosineLR from step 3 on" in train(96, *schedule)
    assert "learning-rate schedule" not in train(112, *schedule, "optimizer.warmup_images=32")
    output = train(128)
    assert ", without its learning-rate schedule: from " in output and f"to a constant {LR:g}" in output
    rates = [row["lr"] for row in read_metrics(run)]
    cosine = [LR * (1 + math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3)]  # steps after the warm-up of 2, of 4
    assert rates[:3] == [LR] * 3 and rates[3:6] == pytest.approx(cosine) and rates[7] == LR


@pytest.mark.slow
@pytest.mark.parametrize("zero", (0, 1))
def test_a_schedule_is_replaced_when_a_run_resumes(tmp_path, capsys, zero):
    """From the first step on, the learning rate is that of the new schedule."""
    config, run = write_json(tmp_path / "ds.json", ep=1, zero=zero), tmp_path / "run"
    warmup = "optimizer.warmup_images=32"
    assert main(["train", *training_arguments(config, run, "run.total_images=80", warmup)]) == 0
    longer = ("run.total_images=160", warmup, "optimizer.schedule=cosine")
    assert main(["train", *training_arguments(config, run, *longer)]) == 0
    said = ", with another learning-rate schedule: WarmupCosineLR instead of WarmupLR, from step 5 on"
    assert said in capsys.readouterr().out
    cosine = [LR * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(3, 8)]  # steps after the warm-up of 2, of 8
    assert [row["lr"] for row in read_metrics(run)] == pytest.approx([0, 0, LR / 2, LR, LR, *cosine])


def test_a_warmup_longer_than_the_run_draws_a_warning(tmp_path, capsys):
    """Of the recipe or of the JSON, whose default is 1,000 steps."""
    sentence = "the warm-up of the learning rate takes {} steps, but the run has 5 steps; lower optimizer.warmup_images"
    unset = write_json(tmp_path / "unset.json", ep=1, zero=0, scheduler={"type": "WarmupLR", "params": {}})
    for config, images, expected in ((None, 80, "5"), (None, 64, ""), (unset, 0, "1,000")):
        config = config or write_json(tmp_path / "ds.json", ep=1, zero=0)
        arguments = training_arguments(config, tmp_path / "run", f"optimizer.warmup_images={images}")
        assert main(["train", *arguments, "--dry-run"]) == 0
        output = capsys.readouterr().out
        assert sentence.format(expected) in output if expected else "the warm-up of" not in output
