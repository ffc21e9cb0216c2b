"""Damaged and foreign checkpoints: the file is named and the next checkpoint is used."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.checkpoint.layout import META, checkpoint_name
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import candidates, newest_valid
from diffmoe_ds.cli import main
from diffmoe_ds.errors import CheckpointError
from tests.helpers.checkpoints import flip, reseal

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ("rank_00000.safetensors", "meta.json", "manifest.json"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_next_checkpoint_used(run_copy, capsys, name, damage):
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
    """Whichever byte of it is flipped, either nothing is lost or the manifest is named."""
    path = run_copy / "checkpoints" / checkpoint_name(96)
    for position in range(0, (path / "manifest.json").stat().st_size, 3):
        flip(path / "manifest.json", position)
        try:
            newest_valid(path, full=True)
        except CheckpointError as error:
            assert "manifest.json" in str(error)
        flip(path / "manifest.json", position)


@pytest.mark.parametrize("resume", ("own", "path"))
def test_no_valid_checkpoint_is_an_error_not_a_new_run(run_copy, tmp_path, capsys, resume):
    """The same one for a run and its ``--dry-run``, which Slurm scripts trust."""
    for path in candidates(run_copy):
        (path / "meta.json").unlink()
    run = ["--run-dir", str(run_copy)]
    if resume == "path":
        run = ["--run-dir", str(tmp_path / "new"), "--resume", str(run_copy)]
    errors = []
    for options in ((), ("--dry-run",), ("--dry-run", "--json")):
        assert main(["train", *run, *options, "--set", "model.name=nano-E4", "model.patch_size=8"]) == 5
        printed = capsys.readouterr()
        assert not printed.out and "none of its 3 checkpoint(s) is valid" in printed.err
        errors.append(printed.err)
    assert len(set(errors)) == 1
    assert all(str(path / "meta.json") in errors[0] for path in candidates(run_copy))


def test_a_dry_run_reads_checkpoints_as_the_run_would(run_copy, capsys):
    """Slurm scripts trust it: damage that no size shows is skipped, and no checkpoint without damage is an error."""
    command = ["train", "--run-dir", str(run_copy), "--dry-run", "--json", "--set", "model.name=nano-E4"]
    command += ["model.patch_size=8"]
    newest, *others = candidates(run_copy)
    flip(newest / "rank_00000.safetensors", 5000)
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["checkpoint"]["path"] == str(others[0]), printed.out
    assert f"the checkpoint {newest} is skipped" in printed.err
    for path in others:
        flip(path / "rank_00000.safetensors", 5000)
    assert main(command) == 5
    printed = capsys.readouterr()
    assert not printed.out and "none of its 3 checkpoint(s) is valid" in printed.err, printed.err


@pytest.mark.parametrize("damage", ("flipped", pytest.param("cut", marks=pytest.mark.slow)))
def test_no_command_uses_a_damaged_checkpoint(run_copy, tmp_path, capsys, damage):
    for path in candidates(run_copy):
        DAMAGE[damage](path / "rank_00000.safetensors")
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.zeros((4, 28, 28, 1), np.uint8))
    out = ["--out", str(tmp_path / "out")]
    commands = [
        ["sample", "--checkpoint", str(run_copy), "--num-images", "1", "--steps", "1", *out],
        ["evaluate", "--checkpoint", str(run_copy), "--reference", str(reference)],
        ["report", str(run_copy), *out],
        ["checkpoint", "export", str(run_copy), *out],
    ]
    for command in commands:
        assert main(command) == 5, command
        error = capsys.readouterr().err
        assert f"none of its 3 checkpoint(s) is valid ({run_copy}" in error and "is damaged" in error, error
        assert not (tmp_path / "out").exists()


def test_the_directory_that_cannot_be_read_is_named(run_copy, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(CheckpointError, match=f"^{run_copy}/checkpoints: cannot be read: Input/output error"):
        candidates(run_copy)


@pytest.mark.parametrize("text", ("../../x\n", "/etc\n", "", "images_000000000999\n", "\xff\xfe", "a" * 5000))
def test_an_invalid_pointer_is_ignored(run_copy, text):
    (run_copy / "checkpoints" / "latest").write_bytes(text.encode("latin-1"))
    assert newest_valid(run_copy, full=True).name == checkpoint_name(96)


def test_the_pointer_decides_among_valid_checkpoints(run_copy):
    (run_copy / "checkpoints" / "latest").write_text(checkpoint_name(64))
    assert [p.name for p in candidates(run_copy)] == [checkpoint_name(n) for n in (64, 96, 32)]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("[]", r"has format \[\]"),
        ("{}", "has format None"),
        ('{"format": 99}', "has format 99, but this version reads 1; update diffmoe_ds"),
        ('{"format": 1}', "files is None"),
        ("nonsense", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ),
)
def test_foreign_metadata_is_refused(run_copy, content, message):
    path = newest_valid(run_copy, full=True)
    (path / META).write_text(content)
    reseal(path)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


@pytest.mark.parametrize("key", ("files", "images", "step", "adam_step", "shapes", "layout", "config", "lr_now"))
@pytest.mark.parametrize("value", (None, "x", -1, [1]))
def test_metadata_with_a_wrong_value_is_refused(run_copy, key, value):
    path = newest_valid(run_copy, full=True)
    meta = json.loads((path / META).read_text())
    reseal(path, {**meta, key: value})
    with pytest.raises(CheckpointError, match=key):
        CheckpointReader(path)
