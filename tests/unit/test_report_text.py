"""``diffmoe report`` of a text model: captions of its dataset or prompts, and the compute of each of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.data import matching_encoders
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.evaluation.report import style
from diffmoe_ds.evaluation.report.probe import Images, probe
from diffmoe_ds.evaluation.stored_prompts import RowPrompts, evenly_spaced
from diffmoe_ds.sampling.generate import SamplingSettings
from diffmoe_ds.sampling.prompts import set_prompts
from diffmoe_ds.text_features import padded_row
from tests.helpers.data import caption, captioned_shard, text_features
from tests.helpers.reports import ReadPage, random_model, report_config, text_config, write_run

QUICK = ("--images", "8", "--steps", "3", "--batch-size", "4")
COMPUTE = ["compute_per_token", "capacity_by_prompt", "hardest_and_easiest_prompts"]


class TinyEncoders:
    """Encoders whose features are those of `caption`."""

    format = text_features()

    def __init__(self, paths, device, each):
        assert each == [4]

    def encode(self, prompts):
        return [caption(prompt) for prompt in prompts]

    def truncation(self, prompts):
        return None


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(style, "DPI", 80)
    monkeypatch.setattr(matching_encoders, "TextEncoders", TinyEncoders)


def report(run: Path, out: Path, *options: str) -> ReadPage:
    assert main(["report", str(run), "--out", str(out), *QUICK, *options]) == 0
    return ReadPage(out / "report.html")


def test_captions_of_the_dataset(tmp_path):
    shard = captioned_shard(tmp_path / "a.tar", 40)
    page = report(write_run(tmp_path / "run", text_config(shard)), tmp_path / "out", "--num-captions", "4")
    assert {"samples_by_prompt", "samples_by_guidance", *COMPUTE} <= set(page.figures())
    for number in (0, 10, 20, 30):
        assert f". image number {number}" in page.text
    assert "8 images of 4 prompts" in page.text and " class" not in page.text
    assert "experts per token" in page.text and "text encoders" in page.text


def test_prompts_of_the_command_line_need_no_dataset(tmp_path):
    run = write_run(tmp_path / "run", text_config(tmp_path / "gone.tar"))
    page = report(run, tmp_path / "out", "--prompt", "red <apple>", "--prompt", "")
    assert "samples_by_prompt" in page.figures() and "1. red <apple>" in page.text and "2. (empty prompt)" in page.text
    assert "has no images" not in page.text


def test_without_prompts_and_dataset_there_are_no_images(tmp_path):
    """One sentence says why, as it does for captions of other encoders."""
    run = write_run(tmp_path / "run", text_config(tmp_path / "gone.tar"))
    page = report(run, tmp_path / "out")
    assert "samples_by_prompt" not in page.figures() and "loss" in page.figures()
    assert "The report has no images: captions of the run's dataset cannot be used: data.path" in page.text
    assert "gone.tar does not exist" in page.text and "pass --prompt to generate images." in page.text
    captioned_shard(tmp_path / "gone.tar", 4, sha256="cd" * 32)
    page = report(run, tmp_path / "other")
    assert "has the sha256 cdcdcdcdcdcd instead of abababababab" in page.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "1"), "generates images from prompts; use --prompt"),
        (("--negative-prompt", "blur"), "--negative-prompt needs --prompt or --prompts"),
        (("--prompt", "a", "--prompt", "b", "--images", "1"), "at least the number of prompts, 2, got 1"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, options, message):
    run = write_run(tmp_path / "run", text_config(tmp_path / "gone.tar"))
    assert main(["report", str(run), "--out", str(tmp_path / "out"), *QUICK, *options]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_refused_for_class_models(tmp_path, capsys):
    run = write_run(tmp_path / "run", report_config("batch_pool"))
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--prompt", "a"]) == 2
    assert "generates images from classes, not prompts" in capsys.readouterr().err


def test_only_conditional_passes_count(tmp_path):
    """With guidance, the passes of the empty prompt are left out; a prompt of the same features is not."""
    model = random_model(text_config(tmp_path))
    null = torch.from_numpy(text_features().null_row)
    rows = torch.stack([null, torch.from_numpy(caption_row("red apple"))])
    set_prompts(model, RowPrompts(rows, null))
    images = Images(torch.tensor([0, 1, 0, 1]), [5, 5, 6, 6], 2)
    guided = probe(model, images, SamplingSettings("euler", 4, 1.5), lambda x: x, 2)
    assert guided.taken_LT.sum() == 4 * 4 * 16 * 2, "images, steps, tokens, layers"
    assert np.isfinite(np.nanmean(guided.capacity_NKL, axis=(1, 2))).all()


def caption_row(text: str) -> np.ndarray:
    return padded_row(text_features().layout, caption(text).features)


def test_captions_are_evenly_spaced(tmp_path):
    prompts = evenly_spaced(ShardDataset([captioned_shard(tmp_path / "a.tar", 9)]), 3)
    assert prompts.captions() == ["image number 0", "image number 3", "image number 6"]
    expected = np.stack([caption_row("image number 6"), text_features().null_row])
    np.testing.assert_array_equal(prompts.rows([2, 3]), expected)
    assert len(evenly_spaced(ShardDataset([tmp_path / "a.tar"]), 20)) == 9
