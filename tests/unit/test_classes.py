"""The number of classes: taken from the training set, or compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffmoe_ds.checkpoint.export import open_weights
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import config_to_dict, load_config
from diffmoe_ds.data.dataset import check_classes, open_dataset, with_classes
from diffmoe_ds.errors import ConfigError
from tests.helpers.data import numbered_shard
from tests.helpers.training import training_arguments


def classes(*overrides: str) -> int:
    config = load_config("fashion", list(overrides))
    dataset = open_dataset(config)
    config = with_classes(config, dataset)
    check_classes(config, dataset)
    return config.model.num_classes


def test_auto_is_the_number_of_the_set(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "folder" / name / "0.png")
    assert classes("model.num_classes=auto") == 10
    assert classes("model.num_classes=auto", f"data.path={tmp_path / 'folder'}") == 3
    assert classes("model.num_classes=auto", f"data.path={tmp_path / 'folder' / 'a'}") == 1, "no labels"
    numbered_shard(tmp_path / "threes.tar", 4)
    assert classes("model.num_classes=auto", f"data.path={tmp_path / 'threes.tar'}") == 4, "labels 0 to 3"
    assert classes("model.num_classes=9", f"data.path={tmp_path / 'threes.tar'}") == 9, "which others may exist"
    for count, folder, found in ((4, "folder", 3), (2, "folder", 3), (3, "threes.tar", 4)):
        said = rf"model\.num_classes is {count}, but .*{folder} has {found} classes; set it to auto\."
        with pytest.raises(ConfigError, match=said):
            classes(f"model.num_classes={count}", f"data.path={tmp_path / folder}")
    with pytest.raises(ConfigError, match="is 11, but the embedded set has 10 classes"):
        classes("model.num_classes=11")


@pytest.mark.parametrize("value", ("0", "-3", "1.5", "many", "true"))
def test_wrong_numbers_are_named(value):
    with pytest.raises(ConfigError, match=r'model\.num_classes must be "auto" or an integer from 1 to 10,000,000, got'):
        load_config("fashion", [f"model.num_classes={value}"])


def test_auto_survives_a_round_trip_and_is_resolved_in_a_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: fashion\nmodel: {num_classes: auto}\n")
    config = load_config(str(tmp_path / "recipe.yaml"))
    assert config_to_dict(config)["model"]["num_classes"] == "auto"
    length = ("model.num_classes=auto", "run.total_images=32", "run.sample_every_images=0")
    assert main(["train", *training_arguments(None, tmp_path / "run", *length)]) == 0
    assert "num_classes: 10" in Path(tmp_path / "run" / "resolved.yaml").read_text()


def test_unnamed_classes_without_images_draw_a_warning(tmp_path, capsys):
    numbered_shard(tmp_path / "fours.tar", 4)
    path = ("--dry-run", "--set", f"data.path={tmp_path / 'fours.tar'}")
    said = f"model.num_classes is 10, but the labels of {tmp_path / 'fours.tar'} end at 3; the other classes"
    for count, warns in (("10", True), ("4", False), ("auto", False)):
        overrides = (*path, f"model.num_classes={count}")
        assert main(["train", *training_arguments(None, tmp_path / "run"), *overrides]) == 0
        assert (said in capsys.readouterr().out) == warns


def test_a_plan_without_images_assumes_those_of_imagenet(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("base: imagenet-256\nmodel: {num_classes: auto}\n")
    found = []
    for recipe in ("imagenet-256", str(tmp_path / "recipe.yaml")):
        assert main(["plan", "--config", recipe, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].pop("assumed") == {} and found[1].pop("assumed") == {"model.num_classes": 1000}
    assert found[0] == found[1]


def test_names_travel_from_prepare_to_the_report(tmp_path, monkeypatch):
    """Through shards, checkpoint and export, to the names of `--classes`, the grids and the report."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "wild boar"):
        Path("photos", name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (32, 32), 60 * number).save(Path("photos", name, f"{number}.png"))
    assert main(["prepare", "images", "--images", "photos", "--size", "32", "--out", "shards"]) == 0
    overrides = ("data.path=shards", "model.num_classes=auto", "model.in_channels=3", "run.total_images=16")
    preview = ("run.sample_every_images=16", "sample.num_images=4", "sample.steps=1")
    assert main(["train", *training_arguments(None, "run", *overrides, *preview, "deepspeed.train_batch_size=16")]) == 0
    assert main(["checkpoint", "export", "run", "--out", "exported"]) == 0
    sample = ["--num-images", "4", "--steps", "1", "--classes", "wild boar,cat"]
    for path in ("run", "exported"):
        reader = open_weights(Path(path))
        assert reader is not None and reader.class_names == ("cat", "wild boar")
        assert main(["sample", "--checkpoint", path, *sample, "--out", f"{path}-samples"]) == 0
    grids = [*Path("run/samples").glob("*.png"), Path("run-samples/grid.png"), Path("exported-samples/grid.png")]
    assert len(grids) == 3
    for path in grids:
        with Image.open(path) as grid:
            assert grid.height > grid.width, "two rows of two images, and the names"
    assert main(["report", "run", "--out", "report", "--steps", "1", "--images", "4"]) == 0
    assert "wild boar" in Path("report/report.html").read_text()
