"""``model.init_from``: the run takes the architecture over, except for the keys that its own recipe sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import read_recipe
from diffmoe_ds.training.fine_tuning import resolve_start
from tests.helpers.training import training_arguments

SHORT = ("run.sample_every_images=0", "run.log_every_images=32")


@pytest.fixture
def source(run_directory, tmp_path, monkeypatch) -> Path:
    """A run whose architecture is not that of any packaged recipe: nano-E4 with 8x8 patches."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run_directory, tmp_path / "source"))


def resolved(recipe: str, *overrides: str) -> tuple[dict, tuple[str, ...]]:
    """The keys of the model, and what the recipe did not say."""
    start = resolve_start(read_recipe(recipe, overrides))
    config = start.config
    return {
        "name": config.model.name, "patch": config.model.patch_size, "classes": config.model.num_classes,
        "capacity": config.routing.capacity, "kind": config.routing.kind, "objective": config.objective.kind,
    }, start.inherited  # fmt: skip


def recipe(text: str) -> str:
    Path("mine.yaml").write_text(text)
    return "mine.yaml"


@pytest.mark.parametrize("base", ("fashion", "emoji", "imagenet-256"))
def test_packaged_recipes_give_way(source, base):
    """Also those that a recipe inherits from; the number of classes is that of the new images."""
    model, inherited = resolved(base, "model.init_from=source")
    assert (model["name"], model["patch"], model["classes"]) == ("nano-E4", 8, 0)
    assert "model.name nano-E4" in inherited and "model.patch_size 8" in inherited
    heir = recipe(f"base: {base}\nmodel: {{init_from: source}}\nrouting:\n")
    assert resolved(heir) == (model, inherited)


def test_keys_of_ones_own_recipe_and_of_set_stay(source):
    mine = recipe("base: fashion\nmodel: {init_from: source, label_dropout: 0.3, num_classes: 10}\n")
    start = resolve_start(read_recipe(mine, ["routing.capacity=0.5"]))
    assert start.config.model.label_dropout == 0.3 and start.config.model.num_classes == 10
    assert start.config.routing.capacity == 0.5 and start.config.model.patch_size == 8


def test_what_belongs_to_the_model_is_taken_over(run_directory, tmp_path, monkeypatch):
    """Values that the recipe alone would not allow, too: a capacity of 12 needs 16 experts."""
    monkeypatch.chdir(tmp_path)
    arguments = ("model.name=nano-E16", "model.patch_size=8", "routing.kind=ec", "routing.capacity=12")
    dense = ["run.total_images=16", "objective.kind=ddpm", "deepspeed.train_batch_size=16", *SHORT]
    assert main(["train", "--run-dir", "other", "--set", *arguments, *dense]) == 0
    model, _ = resolved("fashion", "model.init_from=other")
    assert model == {
        "name": "nano-E16", "patch": 8, "classes": 0, "capacity": 12.0, "kind": "expert_choice", "objective": "ddpm",
    }  # fmt: skip
    assert resolved(recipe("base: fashion\nmodel: {init_from: other}\nrouting: {capacity: 11}\n"))[0]["capacity"] == 11


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("model.patch_size=4", "model.patch_size is 8 in that model and 4 in this run; omit model.patch_size"),
        ("model.name=tiny-E4", "model.hidden_size is 32 in that model and 96 in this run; omit model.name"),
        ("routing.kind=dense", "routing.num_experts is 4 in that model and 1 in this run; omit routing.kind"),
        ("objective.kind=ddpm", "objective.kind is 'flow' in that model and 'ddpm' in this run; omit objective.kind"),
    ),
)
def test_a_key_that_contradicts_the_model_is_named(source, capsys, override, message):
    code = main(["train", "--dry-run", "--run-dir", "new", "--set", "model.init_from=source", override])
    assert code == 2 and f"model.init_from source: {message} to take it over." in capsys.readouterr().err


def test_a_resumed_run_does_not_need_the_initial_model(source, capsys):
    """The same command gives the same model; the banner of the first start says what was taken over."""
    mine = recipe("base: fashion\nmodel: {init_from: source}\nrouting: {capacity: 0.5}\n")
    command = ["train", "--config", mine, "--run-dir", "run", "--set", "deepspeed.train_batch_size=32", *SHORT]
    assert main([*command, "run.total_images=32"]) == 0
    output = capsys.readouterr().out
    assert "starting from the weights of source" in output
    assert "from model.init_from source: model.name nano-E4" in output
    first = yaml.safe_load(Path("run/resolved.yaml").read_text())
    assert first["model"]["patch_size"] == 8 and first["model"]["num_classes"] == 10
    shutil.rmtree(source)
    assert main([*command, "run.total_images=64"]) == 0
    assert "at 32 images" in capsys.readouterr().out
    again = yaml.safe_load(Path("run/resolved.yaml").read_text())
    assert again["model"] == first["model"] and again["routing"] == first["routing"]
    assert main([*command[:3], "--run-dir", "other"]) == 5 and "not a checkpoint" in capsys.readouterr().err


def test_the_plan_is_that_of_the_initial_model(source, capsys):
    assert main(["train", *training_arguments(None, "x", "model.init_from=source", options=("--dry-run",))]) == 0
    capsys.readouterr()
    found = []
    for override in ("model.init_from=source", "model.name=nano-E4"):
        assert main(["plan", "--config", "fashion", "--set", override, "model.patch_size=8", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["params_activated"])
    assert found[0] == pytest.approx(found[1], rel=0.5)
