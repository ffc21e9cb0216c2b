"""MFU: the model's operations per second over the peak of all GPUs, where the peak is known."""

from __future__ import annotations

import json

import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.training import run_log
from diffmoe_ds.training.run_log import open_log, peak_images_per_s

CONFIG = load_config("fashion", [])


@pytest.mark.parametrize(
    ("name", "peak"), (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("GeForce GTX 1080", None))
)
def test_the_peak_is_that_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_images_per_s(CONFIG, 16, torch.device("cuda", 0))
    assert found == (None if peak is None else pytest.approx(16 * peak / flops_per_image(CONFIG).training))
    assert peak_images_per_s(CONFIG, 16, torch.device("cpu")) is None


@pytest.mark.parametrize("peak", (None, 1000.0))
def test_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch, capsys, peak):
    seconds = iter((0.0, 2.0, 3.0))
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(seconds))
    log = open_log(tmp_path, None, 0, 0, 1000)
    log.peak = peak
    for step in (1, 2):
        log.step({"step": step, "images": 100 * step, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-4})
    log.line()
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("mfu") for row in rows] == ([None, None] if peak is None else [0.05, 0.1])
    assert ("MFU 6.7%" in capsys.readouterr().out) == (peak is not None), "200 images in 3 seconds"
