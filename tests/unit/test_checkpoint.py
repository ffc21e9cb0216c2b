"""Checkpoints on disk: files, checks, retention, and what they can be turned into.  One process, no training."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffmoe_ds.checkpoint import export as model_file
from diffmoe_ds.checkpoint.export import ModelFileReader, open_weights
from diffmoe_ds.checkpoint.layout import META, checkpoint_images, checkpoint_name
from diffmoe_ds.checkpoint.load import CheckpointReader, check_same_model, restore_weights
from diffmoe_ds.checkpoint.retention import surplus
from diffmoe_ds.checkpoint.save import CheckpointSaver, write_manifest
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.checkpoint.verify import candidates, newest_valid, read_manifest
from diffmoe_ds.cli import main
from diffmoe_ds.config.schema import CheckpointConfig
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import TMP_PREFIX, Digest, sha256_of
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.topology import Topology
from tests.helpers.processes import REPOSITORY, run_ranks
from tests.helpers.training import SMALLEST_MODEL, training_arguments


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cut=st.integers(1, 7),
)
def test_streamed_files_are_safetensors(tmp_path_factory, shapes, dtype, cut):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    tensors = {f"t{i}/ü": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    entries = [Entry(name, tuple(t.shape), dtype, t.flatten().split(cut)) for name, t in tensors.items()]
    digest = write_safetensors(path, entries, {"format": "pt"})
    assert digest == (path.stat().st_size, sha256_of(path))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)


@given(
    images=st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True),
    keep_last=st.integers(0, 4),
    period=st.integers(0, 20),
    broken=st.sets(st.integers(1, 60)),
)
def test_retention_keeps_the_newest_whole_the_permanent_and_never_nothing(images, keep_last, period, broken):
    names = sorted(map(checkpoint_name, images), reverse=True)
    newest = names[0]
    removed = surplus(
        names, newest, CheckpointConfig(keep_last=keep_last, keep_every_images=period),
        lambda name: checkpoint_images(name) not in broken,
    )  # fmt: skip
    kept = [name for name in names if name not in removed]
    assert newest in kept
    if keep_last == 0:
        assert not removed
        return
    whole = [name for name in names if checkpoint_images(name) not in broken or name == newest]
    assert set(whole[:keep_last]) <= set(kept), "the N newest that can be read"
    if period:
        firsts = {min(group) for group in _by_multiple(images, period)}
        assert {checkpoint_name(n) for n in firsts} <= set(kept)
    permanent = len({n // period for n in images}) if period else 0
    assert len(kept) <= keep_last + permanent + 1


@pytest.fixture
def save(tmp_path):
    """Save a checkpoint of so many images and no weights, as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(images: int, **keep: int) -> Path:
        saver = CheckpointSaver(tmp_path, CheckpointConfig(**keep), torch.device("cpu"))
        saver.start([], [], {"threshold": torch.zeros(1)}, {"images": images})
        return saver.finish()

    yield save
    dist.destroy_process_group()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_checkpoints_of_a_branch_that_was_left_count_no_more(save, tmp_path, capsys):
    """Back from 80 to 32 and on: 48 and 64 are kept, 80 is neither the newest nor one of the two newest; twice."""
    for images in (16, 32, 64, 80):
        save(images, keep_last=4)
    assert not capsys.readouterr().out
    save(48, keep_last=2)
    assert capsys.readouterr().out.split()[:3] == ["left", "left-images_000000000064,", "left-images_000000000080:"]
    assert [path.name for path in candidates(tmp_path)] == [checkpoint_name(n) for n in (48, 32)]
    save(64, keep_last=2)
    save(80, keep_last=2)
    save(72, keep_last=0)
    assert [path.name for path in candidates(tmp_path)] == [checkpoint_name(n) for n in (72, 64)]
    left = [f"left-{checkpoint_name(n)}" for n in (64, 80, 80)]
    left[2] += "-2"
    assert names(tmp_path) == [*map(checkpoint_name, (64, 72)), "latest", *left]


@pytest.mark.parametrize("file", ("rank_00000.safetensors", META, "manifest.json", "latest"))
def test_a_disk_that_is_full_at_any_file_leaves_no_trace(save, tmp_path, monkeypatch, file):
    """The pointer's too: a checkpoint of which is said that it was not saved does not stand there."""
    save(16)
    before = names(tmp_path)

    fsync = os.fsync

    def full(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name.removeprefix(TMP_PREFIX).startswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    expected = rf"images_000000000032 was not saved: rank 0 on .*: .*/{file}: cannot be written: No space"
    expected += r" left on device\.$"
    with pytest.raises(CheckpointError, match=expected):
        save(32)
    assert names(tmp_path) == before and newest_valid(tmp_path, full=True).name == checkpoint_name(16)


def _by_multiple(images: list[int], period: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for n in images:
        groups.setdefault(n // period, []).append(n)
    return [group for multiple, group in groups.items() if multiple > 0]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    """A run of one process with three checkpoints."""
    directory = tmp_path_factory.mktemp("run") / "r"
    overrides = ("run.total_images=96", "run.save_every_images=32")
    arguments = training_arguments(None, directory, *overrides, base=SMALLEST_MODEL)
    finished = run_ranks(1, ["-m", "diffmoe_ds.cli", "train", *arguments])
    assert finished.code == 0, finished.output
    return directory


@pytest.fixture
def run_copy(run_directory, tmp_path) -> Path:
    return Path(shutil.copytree(run_directory, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ("rank_00000.safetensors", "meta.json", "manifest.json"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_next_checkpoint_taken(run_copy, capsys, name, damage):
    broken = run_copy / "checkpoints" / checkpoint_name(96)
    DAMAGE[damage](broken / name)
    found = newest_valid(run_copy, full=True)
    assert found is not None and found.name == checkpoint_name(64)
    warning = capsys.readouterr().err
    assert "WARNING" in warning and str(broken / name) in warning
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        newest_valid(broken, full=True)


def test_every_flipped_byte_of_a_file_is_found(run_copy):
    broken = run_copy / "checkpoints" / checkpoint_name(96)
    for name in ("rank_00000.safetensors", "meta.json"):
        size = (broken / name).stat().st_size
        for position in np.random.default_rng(0).integers(0, size, 20):
            flip(broken / name, int(position))
            with pytest.raises(CheckpointError, match="is damaged"):
                newest_valid(broken, full=True)
            flip(broken / name, int(position))
    assert newest_valid(broken, full=True) == broken


def test_damage_to_the_manifest_is_not_blamed_on_others(run_copy):
    """Whatever byte of it flips, either nothing is lost or the manifest is named."""
    path = run_copy / "checkpoints" / checkpoint_name(96)
    for position in range(0, (path / "manifest.json").stat().st_size, 3):
        flip(path / "manifest.json", position)
        try:
            newest_valid(path, full=True)
        except CheckpointError as error:
            assert "manifest.json" in str(error)
        flip(path / "manifest.json", position)


def test_no_valid_checkpoint_is_an_error_not_a_new_run(run_copy, capsys):
    for path in candidates(run_copy):
        (path / "meta.json").unlink()
    assert main(["train", "--run-dir", str(run_copy), "--set", "model.name=nano-E4", "model.patch_size=8"]) == 5
    assert "none of its 3 checkpoint(s) is valid" in capsys.readouterr().err


@pytest.mark.parametrize("text", ("../../x\n", "/etc\n", "", "images_000000000999\n", "\xff\xfe", "a" * 5000))
def test_a_pointer_to_nowhere_is_passed_over(run_copy, text):
    (run_copy / "checkpoints" / "latest").write_bytes(text.encode("latin-1"))
    assert newest_valid(run_copy, full=True).name == checkpoint_name(96)


def test_the_pointer_decides_among_whole_ones(run_copy):
    (run_copy / "checkpoints" / "latest").write_text(checkpoint_name(64))
    assert [p.name for p in candidates(run_copy)] == [checkpoint_name(n) for n in (64, 96, 32)]


def reseal(path: Path, meta: dict | None = None) -> None:
    """Make a manifest for changed contents, as a person who edits a checkpoint could."""
    if meta is not None:
        (path / META).write_text(json.dumps(meta))
    digests = {name: (file.stat().st_size, sha256_of(file)) for name in read_manifest(path) for file in [path / name]}
    write_manifest(path, {name: Digest(*digest) for name, digest in digests.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("[]", "has format"),
        ("{}", "has format None"),
        ('{"format": 99}', "has format 99, but this version reads 1"),
        ('{"format": 1}', "files is None"),
        ("nonsense", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ),
)
def test_a_foreign_description_is_refused(run_copy, content, message):
    path = newest_valid(run_copy, full=True)
    (path / META).write_text(content)
    reseal(path)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


@pytest.mark.parametrize("key", ("files", "images", "step", "adam_step", "shapes", "layout", "config", "lr_now"))
@pytest.mark.parametrize("value", (None, "x", -1, [1]))
def test_a_description_with_a_wrong_value_is_refused(run_copy, key, value):
    path = newest_valid(run_copy, full=True)
    meta = json.loads((path / META).read_text())
    reseal(path, {**meta, key: value})
    with pytest.raises(CheckpointError, match=key):
        CheckpointReader(path)


def test_export_reshard_and_inspect(run_directory, tmp_path, capsys):
    """One model three ways: a checkpoint, the same cut for 4 ranks, a single file; all hold the same numbers."""
    moved = tmp_path / "moved" / "checkpoints" / checkpoint_name(96)
    assert main(["checkpoint", "reshard", str(run_directory), "--world", "4", "--ep", "2", "--out", str(moved)]) == 0
    for weights in ("ema", "raw"):
        out = str(tmp_path / weights)
        assert main(["checkpoint", "export", str(run_directory), "--weights", weights, "--out", out]) == 0
    bf16 = ["checkpoint", "export", str(moved), "--dtype", "bf16", "--out", str(tmp_path / "bf16")]
    assert main(bf16) == 0
    source, resharded = CheckpointReader(newest_valid(run_directory, full=True)), CheckpointReader(moved)
    expected = {"world": 4, "ep_size": 2, "zero_stage": 1, "global_batch": 32}
    assert len(list(moved.glob("rank_*"))) == 4 and resharded.meta["layout"] == expected
    files = {name: ModelFileReader(tmp_path / name) for name in ("ema", "raw", "bf16")}
    for name, shape in source.meta["shapes"].items():
        numel = torch.Size(shape).numel()
        for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(source.read(kind, name, 0, numel), resharded.read(kind, name, 0, numel))
        assert torch.equal(files["ema"].read("ema", name, 0, numel), source.read("ema", name, 0, numel))
        assert torch.equal(files["raw"].read("fp32", name, 0, numel), source.read("fp32", name, 0, numel))
        low = source.read("ema", name, 0, numel).bfloat16().float()
        assert torch.equal(files["bf16"].read("ema", name, 0, numel), low)
        if numel > 3:
            assert torch.equal(files["ema"].read("ema", name, 2, numel - 3), source.read("ema", name, 2, numel - 3))
    with pytest.raises(CheckpointError, match="holds ema weights only"):
        files["ema"].read("fp32", name, 0, 1)
    assert load_file(tmp_path / "ema" / "model.safetensors").keys() >= source.meta["shapes"].keys()
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


def test_export_holds_one_piece_in_memory(tmp_path):
    """The peak of what is read at once, counted: pieces, not tensors."""
    largest = 0

    class Counting:
        path, kinds = tmp_path, None
        meta = {"shapes": {"w": [1000, 100]}, "images": 0}  # noqa: RUF012
        config = None

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
        patch.setattr(model_file, "config_to_dict", lambda config: {})
        model_file.export(Counting(), "ema", tmp_path / "out")
    assert largest == 512
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (1000, 100)


def test_official_weights_become_a_model_file(tmp_path):
    """The reference's numbers survive: .pt to our file to a model that predicts them."""
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
        ("foreign", "are no weights of the reference"),
        ("list", "holds no weights"),
        ("text", "not loaded"),
    ):
        command = ["checkpoint", "import-official", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / "o")]
        assert main(command) == 5
        assert message in capsys.readouterr().err
    assert main(["checkpoint", "import-official", str(tmp_path / "none.pt"), "--out", str(tmp_path / "o")]) == 5
    assert not (tmp_path / "o").exists()


def test_a_header_that_lies_is_refused(tmp_path, run_directory):
    """safetensors checks offsets itself; a checkpoint of ours must not be read past its end."""
    out = tmp_path / "lie"
    assert main(["checkpoint", "export", str(run_directory), "--out", str(out)]) == 0
    path = out / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelFileReader(out)


def test_models_of_other_classes_may_begin_a_run_but_not_continue_one(run_directory):
    reader = CheckpointReader(newest_valid(run_directory, full=True))
    other = reader.config.model_copy(update={"model": reader.config.model.model_copy(update={"num_classes": 7})})
    check_same_model(reader, other, except_for=("num_classes",))
    with pytest.raises(CheckpointError, match="num_classes is 10 there and 7 here"):
        check_same_model(reader, other)


def test_a_model_without_label_dropout_may_begin_from_one_with(run_directory):
    """Its embedding has one row less, so that it keeps its own, as with other classes."""
    reader = CheckpointReader(newest_valid(run_directory, full=True))
    other = reader.config.model_copy(update={"model": reader.config.model.model_copy(update={"label_dropout": 0.0})})
    check_same_model(reader, other, except_for=("num_classes", "label_dropout"))
    model = DiT(other)
    before = model.y_embedder.embedding_table.weight.clone()
    restore_weights(model, reader, Topology(0, 1, 1, other.num_experts), "ema")
    assert torch.equal(model.y_embedder.embedding_table.weight, before)
    weight = model.state_dict()["final_layer.linear.weight"]
    expected = reader.read("ema", "final_layer.linear.weight", 0, weight.numel())
    assert torch.equal(weight.flatten(), expected)
