"""No file that a user is given gets executed: hostile pickles, YAML and names, wherever files are read."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from tests.helpers.data import write_tar
from tests.helpers.processes import REPOSITORY


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path):
    """Where the hostile file would appear, after a check that it would."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(path)))
    path.unlink()
    yield path
    assert not path.exists(), "the pickle was executed"


def test_checkpoints(tmp_path, trap):
    content = pickle.dumps(Hostile(trap))
    root = tmp_path / "run" / "checkpoints" / "images_000000000016"
    root.mkdir(parents=True)
    (root.parent / "latest").write_bytes(content)
    for name in ("rank_00000.safetensors", "meta.json", "manifest.json"):
        (root / name).write_bytes(content)
    for command in (
        ["train", "--run-dir", str(tmp_path / "run")],
        ["train", "--run-dir", str(tmp_path / "new"), "--resume", str(root)],
        ["train", "--run-dir", str(tmp_path / "new"), "--set", f"model.init_from={tmp_path / 'run'}"],
        ["sample", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")],
        ["checkpoint", "inspect", str(tmp_path / "run")],
        ["checkpoint", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out")],
    ):
        assert main(command) == 5, command


def test_exported_models(tmp_path, trap):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Hostile(trap)))
    (tmp_path / "config.json").write_text(json.dumps({"weights": "ema", "images": 1, "config": {}}))
    assert main(["sample", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 5
    (tmp_path / "config.json").write_bytes(pickle.dumps(Hostile(trap)))
    assert main(["sample", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 5


@pytest.mark.parametrize("wrap", (lambda bad: bad, lambda bad: {"ema": bad}, lambda bad: {"ema": {"w": bad}}))
def test_reference_weights(tmp_path, trap, wrap):
    for number, save in enumerate((torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree)))):
        path = tmp_path / f"{number}.pt"
        save(wrap(Hostile(trap)), path)
        assert main(["checkpoint", "import-official", str(path), "--out", str(tmp_path / "out")]) == 5
    assert not (tmp_path / "out").exists()


def test_recipes_and_settings(tmp_path, trap):
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {text}")
    assert main(["train", "--config", str(recipe), "--run-dir", str(tmp_path / "r")]) == 2
    assert main(["train", "--set", f"data.path={text}", "--run-dir", str(tmp_path / "r")]) in (2, 4)
    hostile = tmp_path / "ds.json"
    hostile.write_bytes(pickle.dumps(Hostile(trap)))
    assert main(["train", "--deepspeed_config", str(hostile), "--run-dir", str(tmp_path / "r")]) == 2


def test_shards(tmp_path, trap):
    array = io.BytesIO()
    np.save(array, np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    for number, (suffix, content) in enumerate(
        (("npy", array.getvalue()), ("npy", pickle.dumps(Hostile(trap))), ("png", pickle.dumps(Hostile(trap))))
    ):
        members = [(f"a.{suffix}", content), ("a.cls", b"0"), ("a.pyd", content), ("a.pkl", content)]
        shard = write_tar(tmp_path / f"{number}.tar", members)
        with pytest.raises(DataError):
            ShardDataset([shard])[0]


UNSAFE = re.compile(
    r"pickle\.loads?\(|yaml\.(unsafe_|full_)?load\((?!.*_StrictLoader)|allow_pickle=True|weights_only=False|extractall\(|"
    r"\beval\(|\bexec\(|shell=True|trust_remote_code"
)


ADVICE = (
    "trust_remote_code=True, because",
    "trust_remote_code=True{vae}",
    'from_pretrained("DIR", trust_remote_code=True)',
)
"""Sentences about exported models for diffusers, which contain our pipeline."""
PIPE = 'subprocess.run(url.removeprefix("pipe:"), shell=True'
"""A command that the user passes as `data.path`, never the contents of a file."""


def test_no_source_line_could_execute_what_it_reads():
    """Covers what the tests above cannot reach: no file of the package has a call that unpickles or executes."""
    found = []
    for path in sorted((REPOSITORY / "diffmoe_ds").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            call = line.split("#")[0]
            if UNSAFE.search(call) and ".eval()" not in call and not any(text in call for text in (PIPE, *ADVICE)):
                found.append(f"{path.name}:{number}: {line.strip()}")
            if "torch.load(" in call and "weights_only=True" not in call:
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found
