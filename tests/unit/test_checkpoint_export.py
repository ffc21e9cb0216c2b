"""What a checkpoint can be turned into: another layout, one file, the start of another run."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from diffmoe_ds.checkpoint import export as model_file
from diffmoe_ds.checkpoint.architecture import first_difference
from diffmoe_ds.checkpoint.export import ModelFileReader, export
from diffmoe_ds.checkpoint.layout import META, checkpoint_name
from diffmoe_ds.checkpoint.load import CheckpointReader, check_same_model
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, SavedLayout, ScheduledValues
from diffmoe_ds.checkpoint.reshard import reshard
from diffmoe_ds.checkpoint.restore import restore_weights
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.topology import Topology
from diffmoe_ds.training.fine_tuning import ADAPTABLE
from tests.helpers.checkpoints import flip


def test_export_reshard_and_inspect(run_directory, tmp_path, capsys):
    """One model in three forms with the same values: a checkpoint, the same for 4 ranks, a single file."""
    moved = tmp_path / "moved" / "checkpoints" / checkpoint_name(96)
    assert main(["checkpoint", "reshard", str(run_directory), "--world", "4", "--ep", "2", "--out", str(moved)]) == 0
    for weights in ("ema", "raw"):
        out = str(tmp_path / weights)
        assert main(["checkpoint", "export", str(run_directory), "--weights", weights, "--out", out]) == 0
    bf16 = ["checkpoint", "export", str(moved), "--dtype", "bf16", "--out", str(tmp_path / "bf16")]
    assert main(bf16) == 0
    source, resharded = CheckpointReader(newest_valid(run_directory, full=True)), CheckpointReader(moved)
    expected = SavedLayout(world=4, ep_size=2, zero_stage=1, global_batch=32)
    assert len(list(moved.glob("rank_*"))) == 4 and resharded.metadata.layout == expected
    files = {name: ModelFileReader(tmp_path / name) for name in ("ema", "raw", "bf16")}
    for name, shape in source.metadata.shapes.items():
        numel = torch.Size(shape).numel()
        for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(source.read(kind, name, 0, numel), resharded.read(kind, name, 0, numel))
        assert torch.equal(files["ema"].read("ema", name, 0, numel), source.read("ema", name, 0, numel))
        assert torch.equal(files["raw"].read("fp32", name, 0, numel), source.read("fp32", name, 0, numel))
        low = source.read("ema", name, 0, numel).bfloat16().float()
        assert torch.equal(files["bf16"].read("ema", name, 0, numel), low)
        if numel > 3:
            assert torch.equal(files["ema"].read("ema", name, 2, numel - 3), source.read("ema", name, 2, numel - 3))
    with pytest.raises(CheckpointError, match="holds only ema weights"):
        files["ema"].read("fp32", name, 0, 1)
    assert load_file(tmp_path / "ema" / "model.safetensors").keys() >= source.metadata.shapes.keys()
    capsys.readouterr()
    assert main(["checkpoint", "inspect", str(run_directory), "--full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["images"] for entry in found] == [96, 64, 32] and not any(entry["problem"] for entry in found)
    assert main(["checkpoint", "inspect", str(tmp_path / "ema")]) == 0
    assert "nano-E4" in capsys.readouterr().out
    assert main(["checkpoint", "reshard", str(run_directory), "--world", "4", "--ep", "3", "--out", "x"]) == 2
    assert main(["checkpoint", "reshard", str(run_directory), "--world", "0", "--out", "x"]) == 2
    assert main(["checkpoint", "reshard", str(run_directory), "--world", "2", "--out", str(moved)]) == 5
    assert main(["checkpoint", "inspect", str(tmp_path / "nothing")]) == 5
    assert main(["checkpoint", "export", str(tmp_path), "--out", "x"]) == 5


def test_inspect_finds_a_changed_byte_and_says_what_it_checked(run_directory, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(run_directory, tmp_path / "run")
    flip(run / "checkpoints" / "images_000000000064" / "rank_00000.safetensors", -5)
    for size, options, code, checked in (
        (1 << 30, [], 5, "every byte"), (1 << 30, ["--no-full"], 0, "sizes"), (100, [], 0, "sizes"),
        (100, ["--full"], 5, "every byte"),
    ):  # fmt: skip
        monkeypatch.setattr("diffmoe_ds.checkpoint.inspect.SMALL", size)
        assert main(["checkpoint", "inspect", str(run), "--json", *options]) == code
        captured = capsys.readouterr()
        found = json.loads(captured.out)["checkpoints"]
        assert [entry["checked"] for entry in found] == [checked] * 3
        assert [bool(entry["problem"]) for entry in found] == [False, code == 5, False]
        assert ("1 of 3 checkpoints damaged" in captured.err) == (code == 5)


def test_export_holds_one_piece_in_memory(tmp_path):
    """Count the values read at once: a piece, not a tensor."""
    largest = 0

    class Counting:
        path, kinds = tmp_path, None
        config = Config()
        metadata = CheckpointMetadata(1, 0, 0, 0, {"w": (1000, 100)}, config, ScheduledValues(0.0, ()))

        def shape(self, name):
            return (1000, 100)

        def buffers(self):
            return {}

        def read(self, kind, name, start, numel):
            nonlocal largest
            largest = max(largest, numel)
            return torch.zeros(numel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "PIECE_NUMEL", 512)
        patch.setattr(model_file, "check_complete", lambda reader: None)  # of one large tensor only
        model_file.export(Counting(), "ema", tmp_path / "out")
    assert largest == 512
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (1000, 100)


def test_an_export_replaces_no_model_and_a_header_that_lies_is_refused(tmp_path, run_directory, capsys):
    """A file must not be read past its end."""
    out = tmp_path / "lie"
    assert main(["checkpoint", "export", str(run_directory), "--out", str(out)]) == 0
    path = out / "model.safetensors"
    before = path.read_bytes()
    assert main(["checkpoint", "export", str(run_directory), "--out", str(out), "--weights", "raw"]) == 5
    assert "already holds model.safetensors; pass a new folder" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelFileReader(out)


@pytest.mark.parametrize("name", ("x_embedder.proj.bias", "y"))
@pytest.mark.parametrize("shape", ([2**62], [1], [0]))
def test_a_checkpoint_whose_shapes_are_not_those_of_its_model_is_not_copied(run_copy, tmp_path, capsys, name, shape):
    path = newest_valid(run_copy, full=False)
    tree = json.loads((path / META).read_text())
    tree["shapes"][name] = shape
    (path / META).write_text(json.dumps(tree))
    reader = CheckpointReader(path)
    for copy in (lambda: reshard(reader, tmp_path / "r", 1, 1), lambda: export(reader, "raw", tmp_path / "e")):
        with pytest.raises(CheckpointError, match=f"{name} has the shape|ends beyond {name}"):
            copy()
    assert not list(tmp_path.glob("[er]"))
    for kind in ("fp32", "buffer"):
        with pytest.raises(CheckpointError, match=r"elements requested|ends beyond"):
            reader.read(kind, name, 0, 2**62)


def test_a_model_with_other_classes_may_start_a_run_but_not_resume_one(run_directory):
    reader = CheckpointReader(newest_valid(run_directory, full=True))
    other = reader.config.model_copy(update={"model": reader.config.model.model_copy(update={"num_classes": 7})})
    assert first_difference(reader.config, other, except_for=ADAPTABLE) is None
    with pytest.raises(CheckpointError, match="num_classes is 10 there and 7 here"):
        check_same_model(reader, other)


def test_a_model_without_label_dropout_may_start_from_one_with_it(run_directory):
    """Its embedding has one row fewer, so it keeps its own, as with other classes."""
    reader = CheckpointReader(newest_valid(run_directory, full=True))
    other = reader.config.model_copy(update={"model": reader.config.model.model_copy(update={"label_dropout": 0.0})})
    assert first_difference(reader.config, other, except_for=ADAPTABLE) is None
    model = DiT(other)
    init_weights(model, seed=0)
    before = model.y_embedder.embedding_table.weight.clone()
    restore_weights(model, reader, Topology(0, 1, 1, other.num_experts), "ema")
    assert torch.equal(model.y_embedder.embedding_table.weight, before)
    weight = model.state_dict()["final_layer.linear.weight"]
    expected = reader.read("ema", "final_layer.linear.weight", 0, weight.numel())
    assert torch.equal(weight.flatten(), expected)
