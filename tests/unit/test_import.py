"""The reference's files: what is read from them, and how malformed and hostile ones are refused."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.checkpoint.export import open_weights
from diffmoe_ds.checkpoint.restore import restore_weights
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.model.dit import DiT, empty_model
from diffmoe_ds.topology import Topology
from tests.helpers.processes import REPOSITORY


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Weights of a small model of the reference."""
    data = np.load(REPOSITORY / "tests" / "golden" / "diffmoe_flow.npz")
    return {key.removeprefix("state/"): torch.from_numpy(data[key]) for key in data if key.startswith("state/")}


def convert(path: Path, *options: str) -> int:
    return main(
        ["checkpoint", "import-official", str(path), "--num-heads", "4", "--out", str(path.parent / "out"), *options]
    )


PATCHES, POSITIONS, CLASSES = "x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"
LAST, EXPERT = "final_layer.linear.weight", "blocks.1.mlp.experts.0.fc1.weight"
EXPANDED = torch.zeros(1).expand(10**6, 10**6)
MALFORMED = {
    "2-D patches": (PATCHES, lambda t: t.flatten(1), "must have 4 dimensions"),
    "no patches": (PATCHES, lambda t: t[:0], "none of them 0"),
    "scalar positions": (POSITIONS, lambda t: t.sum(), "must have 3 dimensions"),
    "flat classes": (CLASSES, lambda t: t.flatten(), "must have 2 dimensions"),
    "scalar output": (LAST, lambda t: t.sum(), "must have 2 dimensions"),
    "flat expert": (EXPERT, lambda t: t.flatten(), "must have 2 dimensions"),
    "five positions": (POSITIONS, lambda t: t[:, :5], "has shape"),
    "sparse": (LAST, lambda t: t.to_sparse(), "is float32 sparse_coo on cpu, but a weight is a dense tensor"),
    "meta": (LAST, lambda t: t.to("meta"), "is float32 strided on meta, but"),
    "expanded": (CLASSES, lambda t: EXPANDED, "a weight is a dense tensor"),
    "whole numbers": ("blocks.0.attn.qkv.weight", lambda t: t.to(torch.int8), "is int8"),
    "complex": ("blocks.0.attn.qkv.weight", lambda t: t.to(torch.complex64), "is complex64"),
    "not a number": ("blocks.0.attn.qkv.weight", lambda t: t * float("nan"), "holds values that are not finite"),
    "infinite": ("blocks.0.attn.qkv.weight", lambda t: t + float("inf"), "holds values that are not finite"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_malformed_weights_are_named(tmp_path, capsys, state, case):
    name, change, message = MALFORMED[case]
    path = tmp_path / "official.pt"
    torch.save({"ema": {**state, name: change(state[name])}}, path)
    assert convert(path) == 5
    error = capsys.readouterr().err
    assert error.startswith(f"diffmoe: error: {path}: ") and repr(name) in error and message in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", ("x", pytest.param("9" * 5000, id="9...9")))
def test_a_block_without_a_valid_number_is_named(tmp_path, capsys, state, block):
    name = f"blocks.{block}.mlp.experts.0.fc1.weight"
    torch.save({**state, name: torch.zeros(2, 2)}, tmp_path / "official.pt")
    assert convert(tmp_path / "official.pt") == 5
    assert name[:1000] in capsys.readouterr().err


def test_num_heads_that_do_not_divide_the_width_are_an_option_error(tmp_path, capsys, state):
    torch.save(state, tmp_path / "official.pt")
    for heads in ("5", "0"):
        assert convert(tmp_path / "official.pt", "--num-heads", heads) == 2
        assert f"--num-heads must divide the width 32 of the weights, got {heads}." in capsys.readouterr().err


def test_a_file_from_an_old_torch_is_read(tmp_path, state):
    torch.save({"ema": state}, tmp_path / "official.pt", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "official.pt") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Hostile:
    """Unpickling it would modify the disk."""

    def __init__(self, function: Callable, folder: str) -> None:
        self.call = function, (folder,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize(("function", "name"), ((os.mkdir, "posix.mkdir"), (shutil.rmtree, "shutil.rmtree")))
def test_a_hostile_file_is_refused_and_its_contents_are_named(tmp_path, capsys, zipped, function, name):
    path = tmp_path / "official.pt"
    hostile = Hostile(function, str(tmp_path / "executed"))
    torch.save({"ema": hostile}, path, _use_new_zipfile_serialization=zipped)
    assert convert(path) == 5
    error = capsys.readouterr().err
    assert f"{path}: holds {name}, which is neither a tensor nor plain data, so it was not loaded." in error
    assert "weights_only" not in error and not (tmp_path / "executed").exists()


def test_an_empty_model_takes_no_memory():
    model = empty_model(load_config("fashion", ["model.num_classes=10_000_000"]))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_official_weights_become_a_model_file(tmp_path):
    """The reference's numbers survive, from .pt to our file to a model that predicts them."""
    for golden in ("diffmoe_flow", "diffmoe_ddpm", "ec_flow", "tc_flow", "dense_flow"):
        data = np.load(REPOSITORY / "tests" / "golden" / f"{golden}.npz")
        state = {key.removeprefix("state/"): torch.from_numpy(data[key]) for key in data if key.startswith("state/")}
        source, out = tmp_path / f"{golden}.pt", tmp_path / golden
        prefixed = {f"module.{name}": value for name, value in state.items()}
        torch.save({"model": {}, "ema": prefixed, "args": argparse.Namespace(lr=1e-4), "opt": {}}, source)
        command = ["checkpoint", "import-official", str(source), "--num-heads", "4", "--out", str(out)]
        assert main(command) == 0
        reader = open_weights(out)
        model = DiT(reader.config).eval()
        restore_weights(model, reader, Topology(0, 1, 1, reader.config.num_experts), "ema")
        model.set_inference("dynamic" if golden.startswith("diffmoe") else "static")
        x, t, y = (torch.from_numpy(data[f"in/{name}"]) for name in "xty")
        with torch.no_grad():
            prediction = model(x, t, y).prediction
        expected = torch.from_numpy(data["eval/out"])
        assert (prediction - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_official_mistakes(tmp_path, capsys):
    torch.save({"ema": {"x": torch.zeros(2)}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (
        ("foreign", "not weights of the reference"),
        ("list", "holds no weights"),
        ("text", "not loaded"),
    ):
        command = ["checkpoint", "import-official", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / "o")]
        assert main(command) == 5
        assert message in capsys.readouterr().err
    assert main(["checkpoint", "import-official", str(tmp_path / "none.pt"), "--out", str(tmp_path / "o")]) == 5
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    (
        (b"]" * (1 << 19) + b".", "more than 524,288 operations"),
        (b"\x80\x02cbuiltins\nbytearray\nK\x09\x85R.", "holds bytearray"),  # 9 could as well be 10^12
        (b"N." + b"0" * (16 << 20), "more than 16 MiB"),
    ),
    ids=("operations", "bytearray", "size"),
)
def test_official_files_that_are_costly_to_unpickle(tmp_path, capsys, pickled, message):
    path = tmp_path / "a.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    assert convert(path) == 5
    assert f"{path}: " in (error := capsys.readouterr().err) and message in error
    if len(pickled) <= 16 << 20:
        path.write_bytes(pickled)
        assert convert(path) == 5
        assert message in capsys.readouterr().err


def test_compressed_official_files_are_refused(tmp_path, capsys):
    """Torch would map the compressed bytes as the weights."""
    torch.save({PATCHES: torch.zeros(64, 4, 2, 2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as stored, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    assert convert(tmp_path / "b.pt") == 5
    assert "has compressed records" in capsys.readouterr().err
