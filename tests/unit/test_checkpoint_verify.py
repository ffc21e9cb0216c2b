"""Damaged and foreign checkpoints: the file is named and the next checkpoint is used."""

from __future__ import annotations

import json

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


def test_no_valid_checkpoint_is_an_error_not_a_new_run(run_copy, capsys):
    for path in candidates(run_copy):
        (path / "meta.json").unlink()
    assert main(["train", "--run-dir", str(run_copy), "--set", "model.name=nano-E4", "model.patch_size=8"]) == 5
    assert "none of its 3 checkpoint(s) is valid" in capsys.readouterr().err


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
