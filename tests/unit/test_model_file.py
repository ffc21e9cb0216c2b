"""An exported model whose ``config.json`` was damaged or edited: refused before anything is allocated or generated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmoe_ds.checkpoint.export import ModelFileReader, digest_of
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import empty_model
from tests.helpers.checkpoints import export_untrained
from tests.helpers.data import numbered_shard
from tests.helpers.sources import ROOT


@pytest.fixture
def exported(tmp_path) -> Path:
    """A small untrained model."""
    return export_untrained(tmp_path / "model")


def refused(folder: Path, capsys, *messages: str) -> None:
    """Both commands that read an export print the same one-sentence error."""
    sample = ["sample", "--checkpoint", str(folder), "--num-images", "2", "--steps", "1", "--out", str(folder / "out")]
    for command in (["checkpoint", "inspect", str(folder)], sample):
        assert main(command) == 5
        error = capsys.readouterr().err
        assert error.startswith("diffmoe: error: ") and error.count("\n") == 1
        assert all(message in error for message in messages), error
    assert not (folder / "out").exists()


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_a_valid_export_is_read(exported, capsys):
    assert main(["checkpoint", "inspect", str(exported)]) == 0
    assert ModelFileReader(exported).images == 16


def test_both_files_identify_an_exported_model(exported):
    digests = [digest_of(ModelFileReader(exported))]
    edit(exported, lambda description: description["config"]["routing"].update(capacity=0.5))
    digests.append(digest_of(ModelFileReader(exported)))
    tensors = load_file(exported / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, exported / "model.safetensors")
    digests.append(digest_of(ModelFileReader(exported)))
    assert digests[-1] == digest_of(ModelFileReader(exported)) and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    (
        ("weights", [], "weights is []; valid: ema, raw"),
        ("weights", {}, "weights is {}; valid: ema, raw"),
        ("weights", None, "weights is None"),
        ("images", "many", "images must be a non-negative integer, got 'many'"),
        ("images", -1, "images must be a non-negative integer, got -1"),
        ("images", True, "images must be a non-negative integer, got True"),
        ("config", [], "must be a section with keys"),
    ),
)
def test_a_description_with_wrong_types_is_refused(exported, capsys, key, value, message):
    edit(exported, lambda description: description.update({key: value}))
    refused(exported, capsys, "config.json: ", message)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    (
        ("model", "num_classes", 10**7, "'y_embedder.embedding_table.weight' has shape (11, 32), but"),
        ("model", "hidden_size", 4 * 10**9, "model.hidden_size must be positive and at most 65536, got 4000000000"),
        ("model", "mlp_ratio", 1e308, "model.mlp_ratio must give an FFN a hidden width from 1 to 2^63, got 1e+308"),
        ("model", "mlp_ratio", 1e16, "parameters; at most 1e+12 are possible"),
        ("model", "input_size", 65_536, "model.input_size must give at most 1,048,576 tokens per image, got 65536"),
        ("model", "depth", 3, "depth is 3, but"),
        ("model", "depth", 10**15, "model.depth must be positive and at most 512, got 1000000000000000"),
        ("model", "label_dropout", 0.0, "'y_embedder.embedding_table.weight' has shape"),
        ("model", "mlp_ratio", 4.0, "has shape"),
        ("model", "mlp", "swiglu", "holds no tensor"),
        ("routing", "num_experts", 8, "has shape"),
        ("routing", "capacity_predictor", False, "which the model of"),
        ("routing", "interleave", False, "blocks.0"),
        ("routing", "shared_experts", 1, "holds no tensor"),
        ("objective", "kind", "ddpm", "'final_layer.linear.bias' has shape"),
    ),
)  # fmt: skip
def test_a_description_of_another_model_is_refused(exported, capsys, section, key, value, message):
    edit(exported, lambda description: description["config"][section].update({key: value}))
    refused(exported, capsys, message)


THRESHOLD = "blocks.1.mlp.expert_threshold"
TENSORS = {
    "long threshold": (lambda t: t.update({THRESHOLD: torch.zeros(5)}), "has shape (5,), but"),
    "no threshold": (lambda t: t.pop(THRESHOLD), "holds no tensor"),
    "left over": (lambda t: t.update(extra=torch.zeros(1)), "holds 'extra', which the model of"),
    "whole numbers": (lambda t: t.update({THRESHOLD: torch.zeros(4, dtype=torch.int8)}), "is of type I8; valid: F32"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_of_another_model_are_refused(exported, capsys, case):
    change, message = TENSORS[case]
    tensors = load_file(exported / "model.safetensors")
    change(tensors)
    save_file(tensors, exported / "model.safetensors")
    refused(exported, capsys, message)


def test_training_may_start_from_an_export_with_other_classes(exported, tmp_path, capsys):
    """`model.init_from` compares the file with its own description, not with the new run's classes."""
    shard = numbered_shard(tmp_path / "four.tar", 4)
    overrides = ["model.name=nano-E4", "model.patch_size=8", f"model.init_from={exported}", f"data.path={shard}"]
    arguments = ["train", "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", *overrides, "model.num_classes=12"]
    assert main(arguments) == 0, capsys.readouterr().err
    with pytest.raises(CheckpointError, match="depth is 2"):
        edit(exported, lambda description: description["config"]["model"].update(depth=2))
        ModelFileReader(exported)


def documented_names() -> list[str]:
    """Return the names in the table of tensors; one that begins with a dot replaces the end of the one before."""
    page = (ROOT / "docs" / "checkpoints-and-recovery.md").read_text(encoding="utf-8")
    table = page.split("| tensor | shape | meaning |")[1].split("\n\n")[0]
    names: list[str] = []
    for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            parts = name.removeprefix(".").split(".")
            names.append(".".join(names[-1].split(".")[: -len(parts)] + parts) if name.startswith(".") else name)
    return names


def test_the_documented_names_are_those_of_models():
    names = documented_names()
    patterns = [
        re.compile(
            re.escape(name)
            .replace("blocks\\.b", r"blocks\.\d+")
            .replace("projs\\.e", r"projs\.\d+")
            .replace(r"\*", ".*")
        )
        for name in names
    ]
    text = ["model.conditioning=text", "model.text_encoders=[[4, 3, 2], [4, 5, 6]]"]
    repa = ["loss.repa_weight=0.5", "loss.repa_features=[2, 3]"]
    overrides = (["routing.shared_experts=1"], ["model.mlp=swiglu"], text, repa)
    found = {name for given in overrides for name in empty_model(load_config("fashion", given)).state_dict()}
    assert not [name for name in found if not any(pattern.fullmatch(name) for pattern in patterns)]
    assert not [pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, found))]
