"""``diffmoe evaluate --checkpoint``: generated images, capacity and validation loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from tests.helpers import sampling
from tests.helpers.checkpoints import export_untrained
from tests.helpers.data import numbered_shard
from tests.helpers.features import assert_same


@pytest.fixture
def reference(tmp_path) -> list[str]:
    """Options that choose a reference of 9 images and an extractor."""
    np.savez(tmp_path / "r.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8))
    return ["--reference", str(tmp_path / "r.npz"), "--extractor", "tests.helpers.features:Averages"]


def test_a_checkpoint_is_evaluated_as_its_samples_are(reference, tmp_path, capsys):
    """The images are those of ``diffmoe sample``; nothing else is printed with --json, and nothing is written."""
    model = export_untrained(tmp_path / "model")
    images = ["--checkpoint", str(model), "--num-images", "6", "--steps", "2", "--seed", "3", "--labels", "random"]
    assert main(["sample", *images, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    found = []
    for source in (images, ["--samples", str(tmp_path / "out" / "samples.npz")]):
        assert main(["evaluate", *source, *reference, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert 0 < found[0].pop("capacity") <= 4
    assert_same(*found)
    assert found[0]["n"] == 6
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["evaluate", *images, "--num-images", "1", *reference, "--json"]) == 2
    assert "1 image to generate; metrics need at least 2" in capsys.readouterr().err


def test_the_result_of_a_model_has_its_capacity_and_validation_loss(reference, tmp_path, capsys):
    model = sampling.write_random_model(tmp_path / "model")
    numbered_shard(tmp_path / "held_out.tar", 20)
    arguments = ["evaluate", "--checkpoint", str(model), "--num-images", "6", "--steps", "2", "--capacity", "2"]
    arguments += reference
    assert main([*arguments, "--validation", str(tmp_path / "held_out.tar"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["capacity"] == pytest.approx(2, rel=0.05)
    levels = found["validation_loss_by_noise_level"]
    assert len(levels) == 10 and found["validation_loss"] == pytest.approx(np.mean(levels)) and min(levels) > 0
    assert found["validation_images"] == 20
    assert main([*arguments, "--validation", str(tmp_path / "held_out.tar")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation loss")]
    assert line.split() == ["validation", "loss", f"{found['validation_loss']:.5g}", "20", "held-out", "images"]
    folder, expected = tmp_path / "unlabelled", "a folder of images or shards"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    for path, message in (
        ("/nowhere.tar", "no shard"),
        ("/nowhere", f"does not exist; expected {expected}"),
        (str(tmp_path / "r.npz"), f"is not a tar file; expected {expected}"),
        (str(folder), "have no label, but the model has 10 classes; use labelled images, or a model without classes"),
    ):
        assert main([*arguments, "--validation", path]) == 4
        error = capsys.readouterr().err
        assert f"--validation {path}: " in error and message in error
