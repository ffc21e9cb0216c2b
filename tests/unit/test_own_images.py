"""docs/own-images.md: its commands and its Python, in order, on a few tiny images and with a short run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from tests.helpers.sources import ROOT

PAGE = (ROOT / "docs" / "own-images.md").read_text(encoding="utf-8")
SHORT = {
    "train": [
        "--set", "run.total_images=48", "deepspeed.train_batch_size=16", "model.hidden_size=32", "sample.steps=1",
    ],
    "sample": ["--steps", "2"],
    "report": ["--steps", "2", "--images", "6"],
}  # fmt: skip
"""Options that shorten a command."""


def blocks(language: str) -> list[str]:
    """The code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def photographs(folder: str, *, count: int) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (70 + number, 80, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder) / f"{number:03}.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("classes", (("cat", "dog", "horse"), ()))
def test_the_page_leads_to_images(tmp_path, monkeypatch, classes):
    """For a folder of classes and for one without; a reader of the latter omits what the page says."""
    monkeypatch.chdir(tmp_path)
    for name in classes:
        photographs(f"pets/{name}", count=3)
        assert f"  {name}/" in PAGE, "the folders are those of the page"
    if not classes:
        photographs("pets", count=8)
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    names = [words[1] for words in lines]
    assert all(words[0] == "diffmoe" for words in lines)
    assert names == ["init", "train", "train", "sample", "sample", "report"]
    for _, command, *options in lines:
        if "--classes" in options and not classes:
            continue
        assert main([command, *options, *SHORT.get(command, [])]) == 0, (command, *options)
    columns = 3 if classes else 4
    with Image.open("more-samples/grid.png") as grid:
        assert grid.width % (66 * columns + 2) == 0
    assert list(Path("runs/pets/samples").glob("*.png")) and Path("report/report.html").is_file()
    with np.load("more-samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (16, 64, 64, 3)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs("pets/cat", count=3)
    photographs("pets/dog", count=3)
    for command in (["init", "pets", "--size", "64"], ["train", "--config", "pets.yaml", *SHORT["train"]]):
        assert main(command) == 0
    (snippet,) = blocks("python")
    exec(compile(snippet, "own-images.md", "exec"), {})
    with Image.open("cat.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
