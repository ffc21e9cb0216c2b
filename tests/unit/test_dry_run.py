"""``diffmoe train --dry-run``: the estimate of the memory, and reading of all images with ``--thorough``."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.training import dry_run as dry_run_module
from tests.helpers.data import image_file
from tests.helpers.training import training_arguments


@pytest.fixture
def photos(tmp_path):
    """Forty images in ten classes, of which three cannot be decoded."""
    folder = tmp_path / "photos"
    for number in range(40):
        path = folder / str(number % 10) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image_file(np.full((32, 32), number, np.uint8))
        path.write_bytes(b"no picture" if number in (7, 8, 30) else image)
    return folder


def dry_run(tmp_path, *overrides, options=()):
    return main(["train", *training_arguments(None, tmp_path / "run", *overrides, options=("--dry-run", *options))])


def test_memory_is_that_of_the_planner_and_compared_with_this_host(tmp_path, capsys, monkeypatch):
    for total, verdict in ((64e9, "fits"), (1e9, "does not fit")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=int(total)))
        assert dry_run(tmp_path) == 0
        out = capsys.readouterr().out
        assert " per rank at the peak" in out and f"    verdict  {verdict} on this host" in out
        assert dry_run(tmp_path, options=["--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["memory_per_rank_gb"] == pytest.approx(sum(plan["memory_parts_gb"].values()))
        assert plan["fits"] == (verdict == "fits") and plan["device_gb"] == total / 1e9
        assert "unreadable" not in plan
    assert main(["plan", "--config", "fashion", "--world", "1", "--dtype", "fp32", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_per_rank_gb"]
    assert main(["train", "--dry-run", "--json", "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["memory_per_rank_gb"] == pytest.approx(planned)


def test_thorough_names_unreadable_images_within_the_limit(tmp_path, capsys, photos):
    limit = [f"data.path={photos}", "data.max_unreadable=0.1"]
    assert dry_run(tmp_path, *limit) == 0
    assert "cannot be decoded" not in capsys.readouterr().out, "nothing is read without --thorough"
    assert dry_run(tmp_path, *limit, options=["--thorough"]) == 0
    printed = capsys.readouterr()
    assert f"{photos}: 3 unreadable images of 40; data.max_unreadable 0.1 allows 4" in printed.out
    assert [f"{number:02d}.png cannot be decoded" in printed.out for number in (7, 8, 30)] == [True] * 3
    assert "40/40" in printed.err, "a progress bar"
    assert not (tmp_path / "run").exists()


def test_thorough_fails_beyond_the_limit(tmp_path, capsys, photos):
    assert dry_run(tmp_path, f"data.path={photos}", options=["--thorough"]) == 4
    printed = capsys.readouterr()
    assert printed.out.count("cannot be decoded") == 3
    assert "3 unreadable images of 40; data.max_unreadable 0.01 allows 0; the first is: " in printed.err
    assert dry_run(tmp_path, f"data.path={photos}", options=["--thorough", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert len(found["unreadable"][str(photos)]) == 3 and found["unreadable_allowed"] == {str(photos): 0}


def test_thorough_names_few_of_many_and_reads_held_out_images(tmp_path, capsys, photos):
    for number in range(20, 30):
        (photos / str(number % 10) / f"{number}.png").write_bytes(b"no picture")
    held_out = ["eval.every_images=80", f"data.validation_path={photos}", "eval.num_images=0"]
    assert dry_run(tmp_path, *held_out, options=["--thorough"]) == 4
    printed = capsys.readouterr()
    assert "embedded images: all 10,000 images can be read" in printed.out
    assert printed.out.count("cannot be decoded") == 5 and "and 8 more" in printed.out
    assert "13 unreadable images of 40; of held-out images, the run allows 0" in printed.err


def test_thorough_needs_a_dry_run(tmp_path, capsys):
    assert main(["train", "--thorough", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--thorough needs --dry-run." in capsys.readouterr().err


@pytest.mark.parametrize(("memory", "verdict"), ((80e9, "fits"), (3e9, "does not fit")))
def test_memory_is_compared_with_the_gpu_if_there_is_one(tmp_path, capsys, monkeypatch, memory, verdict):
    gpu = SimpleNamespace(name="H100", total_memory=int(memory))
    monkeypatch.setattr(dry_run_module, "local_device", lambda launch: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    assert f"    verdict  {verdict} on H100 with {memory / 1e9:.1f} GB per rank;" in capsys.readouterr().out
