"""Runs of text models: where they may start, their grids, and what is said of their checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffmoe_ds.cli import main
from diffmoe_ds.data import matching_encoders
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.training import preview
from tests.helpers.data import caption, captioned_shard, numbered_shard, text_features
from tests.helpers.training import SMALLEST_MODEL, training_arguments

GRID = ("run.sample_every_images=32", "sample.num_images=4", "sample.steps=2")
TEXT = (*SMALLEST_MODEL, "model.conditioning=text", "run.total_images=32", *GRID, "deepspeed.train_batch_size=16")
ENCODERS = "text encoder 1 (tiny) has the sha256 cdcdcdcdcdcd instead of abababababab (tiny)"
WIDER = "text encoder 1 (tiny) has width 5 instead of 3 (tiny)"


class TinyEncoders:
    """Encoders whose features are those of `caption`."""

    format = text_features()

    def __init__(self, paths, device, each):
        assert (list(paths), each) == (["tiny"], [4])

    def encode(self, prompts):
        return [caption(prompt) for prompt in prompts]

    def truncation(self, prompts):
        return "too long" if "red apple" in prompts else None


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with captions, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("text")
    shard = captioned_shard(folder / "a.tar", 24)
    assert main(["train", *training_arguments(None, folder / "run", f"data.path={shard}", base=TEXT)]) == 0
    return folder


@pytest.fixture
def grids(monkeypatch) -> list[list[str]]:
    """The prompts of every grid, and encoders that exist."""
    drawn = []

    def prompt_grid(pixels, prompts_N):
        drawn.append(list(prompts_N))
        return pixels[0].repeat(3, axis=2)

    monkeypatch.setattr(preview, "prompt_grid", prompt_grid)
    monkeypatch.setattr(matching_encoders, "TextEncoders", TinyEncoders)
    return drawn


def train(folder: Path, run: str, *overrides: str, dry: bool = True, base: tuple[str, ...] = TEXT) -> int:
    options = ("--dry-run",) if dry else ()
    return main(["train", *training_arguments(None, folder / run, *overrides, base=base, options=options)])


def test_grids_show_captions_or_prompts(trained, tmp_path, grids, capsys):
    data, short = f"data.path={trained / 'a.tar'}", "run.total_images=16"
    assert train(tmp_path, "captions", data, short, dry=False) == 0
    assert grids.pop() == [f"image number {number}" for number in (0, 6, 12, 18)]
    assert train(tmp_path, "prompts", data, short, "sample.prompts=[red apple,'']", dry=False) == 0
    assert grids.pop() == ["red apple", "", "red apple", ""]
    assert capsys.readouterr().err.count("*** WARNING: sample.prompts: too long ***") == 1


def test_prompts_need_the_encoders_of_the_captions(trained, tmp_path, grids, capsys, monkeypatch):
    arguments = (f"data.path={trained / 'a.tar'}", "sample.prompts=[red apple]")
    monkeypatch.setattr(TinyEncoders, "format", text_features(sha256="cd" * 32))
    assert train(tmp_path, "run", *arguments, dry=False) == 2
    error = capsys.readouterr().err
    assert "sample.prompts needs the text encoders of the training set: the text encoder must be the one used" in error
    assert f"training: {ENCODERS}; remove it to show captions instead." in error

    def missing(*arguments, **options):
        raise ConfigError("the text encoder tiny cannot be loaded: gone.")

    monkeypatch.setattr(matching_encoders, "TextEncoders", missing)
    assert train(tmp_path, "run", *arguments, dry=False) == 2
    assert "tiny cannot be loaded: gone; remove it to show captions instead." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "message"), [({"sha256": "cd" * 32}, ENCODERS), ({"width": 5}, "model.text_encoders is [[4, 3, 2]]")]
)
def test_a_run_resumes_with_its_encoders_only(trained, tmp_path, capsys, form, message):
    other = captioned_shard(tmp_path / "b.tar", 24, **form)
    same = captioned_shard(tmp_path / "c.tar", 5, name="moved")
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert train(tmp_path, "run", f"data.path={other}") == 5
    assert message in capsys.readouterr().err
    assert train(tmp_path, "run", f"data.path={same}", "run.total_images=48") == 0
    assert f"continues {run / 'checkpoints'}" in capsys.readouterr().out


def test_fine_tuning_takes_new_captions_of_the_same_encoders(trained, tmp_path, capsys):
    new = captioned_shard(tmp_path / "new.tar", 7, name="moved")
    other = captioned_shard(tmp_path / "other.tar", 7, sha256="cd" * 32)
    wider = captioned_shard(tmp_path / "wider.tar", 7, width=5)
    start = (f"model.init_from={trained / 'run'}", "run.total_images=16", *GRID[1:], "deepspeed.train_batch_size=16")
    assert train(tmp_path, "tuned", f"data.path={new}", *start, dry=False, base=()) == 0
    model = yaml.safe_load((tmp_path / "tuned" / "resolved.yaml").read_text())["model"]
    assert (model["conditioning"], model["text_encoders"], model["patch_size"]) == ("text", [[4, 3, 2]], 8)
    capsys.readouterr()
    for shard, message in ((other, ENCODERS), (wider, WIDER)):
        assert train(tmp_path, "other", f"data.path={shard}", *start, base=()) == 5
        error = capsys.readouterr().err
        assert f"model.init_from {trained / 'run'}: was trained with text encoders other than those" in error
        assert message in error


def test_a_class_model_does_not_become_a_text_model(run_directory, trained, tmp_path, capsys):
    """Neither by resuming nor by fine-tuning."""
    data = f"data.path={trained / 'a.tar'}"
    text = ("model.conditioning=text", data, "deepspeed.train_batch_size=16")
    assert train(tmp_path, "new", f"model.init_from={run_directory}", *text, base=()) == 2
    wanted = "model.conditioning is 'class' in that model and 'text' in this run; omit model.conditioning"
    assert wanted in capsys.readouterr().err
    shutil.copytree(run_directory, tmp_path / "run")
    assert train(tmp_path, "run", *text, base=SMALLEST_MODEL) == 5
    assert "model.conditioning is 'class' there and 'text' here" in capsys.readouterr().err


def test_held_out_captions_have_the_same_encoders(trained, tmp_path, capsys):
    held_out = captioned_shard(tmp_path / "held_out.tar", 7, sha256="cd" * 32)
    evaluated = (f"data.path={trained / 'a.tar'}", f"data.validation_path={held_out}", "eval.every_images=16")
    assert train(tmp_path, "run", *evaluated) == 4
    assert (
        f"data.validation_path {held_out}: the captions were encoded with text encoders other"
        in capsys.readouterr().err
    )


def test_inspect_names_the_encoders(trained, capsys):
    assert main(["checkpoint", "inspect", str(trained / "run"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert found["conditioning"] == "text" and found["text_encoders"] == ["tiny (SHA-256 abababababab)"]
    assert "classes" not in found


def evaluate(trained: Path, *options: str) -> int:
    return main(["evaluate", "--checkpoint", str(trained / "run"), *options])


def test_the_validation_loss_needs_neither_prompts_nor_a_reference(trained, tmp_path, capsys):
    held_out = captioned_shard(tmp_path / "held_out.tar", 7)
    assert evaluate(trained, "--validation", str(held_out), "--json", "--batch-size", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"validation_loss", "validation_loss_by_noise_level", "validation_images"}
    assert found["validation_images"] == 7 and 0 < found["validation_loss"] < 10
    assert evaluate(trained, "--validation", str(held_out)) == 0
    assert capsys.readouterr().out == f"validation loss   {found['validation_loss']:<9.5g}  7 held-out images\n"
    for options, message in (
        (("--validation", str(held_out), "--prompt", "a"), "--prompt needs --reference, --clip or --retrieval"),
        (("--validation", str(held_out), "--steps", "7"), "--steps needs --reference"),
        ((), "--reference is missing"),
    ):
        assert evaluate(trained, *options) == 2
        assert message in capsys.readouterr().err
    other = captioned_shard(tmp_path / "other.tar", 7, width=5)
    assert evaluate(trained, "--validation", str(other)) in (2, 4)
    assert "text features" in capsys.readouterr().err


def test_metrics_of_prompts(trained, tmp_path, grids, capsys):
    np.savez(tmp_path / "r.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 1), np.uint8))
    (tmp_path / "prompts.txt").write_text("red apple\nblue car\ngreen door\n")
    reference = (
        "--reference",
        str(tmp_path / "r.npz"),
        "--extractor",
        "tests.helpers.features:Averages",
        "--steps",
        "2",
    )
    held_out = str(captioned_shard(tmp_path / "held_out.tar", 7))
    more = ("--prompts", str(tmp_path / "prompts.txt"), "--validation", held_out, "--json")
    assert evaluate(trained, *reference, *more, "--capacity", "0.5") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 3 and found["validation_images"] == 7 and "frechet" in found
    assert evaluate(trained, *reference) == 2
    assert "pass --prompt TEXT or --prompts FILE" in capsys.readouterr().err


def test_a_text_model_needs_captions(tmp_path, capsys):
    shard = numbered_shard(tmp_path / "plain.tar", 3)
    assert train(tmp_path, "run", f"data.path={shard}") == 4
    assert "diffmoe prepare text" in capsys.readouterr().err


def test_a_table_of_captions_needs_encoders(trained, tmp_path, capsys):
    assert train(tmp_path, "run", f"data.path={trained / 'a.tar'}", "data.captions=a.csv") == 2
    assert "data.captions a.csv needs data.text_encoder" in capsys.readouterr().err
