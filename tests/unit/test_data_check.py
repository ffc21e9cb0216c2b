"""What ``prepare check`` finds and training refuses: unfinished datasets, an index that does not match its shards."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.data.dataset import open_source
from diffmoe_ds.data.sources.index_files import INDEX, SAMPLES
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.tar_index import Entry
from diffmoe_ds.errors import DataError
from tests.helpers.data import PNG, photographs, tree, write_tar

NOT_FINISHED = "is not finished; run the same diffmoe prepare again to finish it"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photographs and the four shards made from them."""
    folder = tmp_path_factory.mktemp("made")
    photographs(folder / "photographs", 12, size=16)
    assert prepare(folder, folder / "set") == 0
    return folder


def prepare(made: Path, out: Path) -> int:
    arguments = ["--images", str(made / "photographs"), "--size", "8", "--shard-images", "3", "--out", str(out)]
    return main(["prepare", "images", *arguments])


def check(folder: Path, capsys) -> list[str]:
    """The problems that ``prepare check`` finds; its exit code must match."""
    capsys.readouterr()
    code = main(["prepare", "check", str(folder), "--json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert code == (4 if problems else 0)
    return problems


@pytest.mark.parametrize("lost", ["parts", "settings.json", None])
def test_an_unfinished_preparation_is_not_a_dataset(made, monkeypatch, tmp_path, lost, capsys):
    out = tmp_path / "set"
    with monkeypatch.context() as rank:  # one of two ranks has done its shards
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            rank.setenv(name, value)
        assert prepare(made, out) == 0
    if lost == "parts":
        shutil.rmtree(out / lost)
    elif lost:
        (out / lost).unlink()
    problems = check(out, capsys)
    assert len(problems) == 1 and NOT_FINISHED in problems[0]
    for path in (str(out), f"{out}/shards-*.tar"):
        assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", f"data.path={path}"]) == 4
        assert main(["prepare", "images", "--images", path, "--out", str(tmp_path / "again")]) == 4
        assert capsys.readouterr().err.count(NOT_FINISHED) == 2
    if lost is None:
        assert prepare(made, out) == 0 and check(out, capsys) == []


def test_a_foreign_settings_file_is_not_a_preparation(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", PNG)])
    (tmp_path / "settings.json").write_text('{"size": 3}')
    assert len(ShardDataset(expand(tmp_path))) == 1


@pytest.mark.parametrize("column", ["label", "offset", "key_offset"])
def test_an_index_that_does_not_match_its_shards(made, tmp_path, column, capsys):
    """With its checksum it is refused on opening; without one, only reading the shards reveals it."""
    shutil.copytree(made / "set", tmp_path / "set")
    samples = np.load(tmp_path / "set" / SAMPLES)
    samples[:, Entry._fields.index(column)] = samples[::-1, Entry._fields.index(column)]
    np.save(tmp_path / "set" / SAMPLES, samples)
    with pytest.raises(DataError, match=r"index.json do not match each other; run the same diffmoe prepare again"):
        ShardDataset(expand(tmp_path / "set"))
    assert "do not match each other" in check(tmp_path / "set", capsys)[0]
    index = json.loads((tmp_path / "set" / INDEX).read_text())
    assert set(index.pop("index_sha256")) == {"index-samples.npy", "index-keys.npy"}
    (tmp_path / "set" / INDEX).write_text(json.dumps(index))
    assert len(ShardDataset(expand(tmp_path / "set"))) == 12
    problems = check(tmp_path / "set", capsys)
    assert problems and all("another offset, label, key, text or features than" in problem for problem in problems)


def test_an_index_with_other_sizes_or_without_hashes(made, tmp_path, capsys):
    shutil.copytree(made / "set", tmp_path / "set")
    path = tmp_path / "set" / INDEX
    index = json.loads(path.read_text())
    index["shards"][1]["bytes"] += 512
    path.write_text(json.dumps(index))
    problems = check(tmp_path / "set", capsys)
    assert len(problems) == 1 and "gives shard shards-00001.tar other sizes" in problems[0]
    for sha256 in (None, []):
        path.write_text(json.dumps({**index, "sha256": sha256}))
        assert "lacks the table sha256 of the shards" in check(tmp_path / "set", capsys)[0]


def test_more_shards_than_a_process_may_open(tmp_path, capsys):
    for number in range(80):
        write_tar(tmp_path / f"{number:02d}.tar", [(f"{number}.png", PNG)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 40, hard))
    try:
        assert check(tmp_path, capsys) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("loss", ["gone", "cut"])
def test_a_lost_shard_is_detected_and_regenerated(made, tmp_path, loss, capsys):
    out = tmp_path / "set"
    shutil.copytree(made / "set", out)
    kept, shard = tree(out), out / "shards-00002.tar"
    if loss == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 512)
    with pytest.raises(DataError, match=r"shards-00002.tar (cannot be read: No such file|has 512 bytes)"):
        open_source(out)
    assert len(ShardDataset(expand(f"{out}/shards-0000[01].tar"))) == 6, "a pattern needs only its matches"
    assert any("shards-00002.tar" in problem for problem in check(out, capsys))
    assert prepare(made, out) == 0 and tree(out) == kept and not (out / "parts").exists()
    assert "is complete again, 1 shard(s) regenerated" in capsys.readouterr().out


def test_a_shard_that_cannot_be_reproduced_is_not_replaced(made, tmp_path, capsys):
    shutil.copytree(made / "photographs", tmp_path / "photographs")
    shutil.copytree(made / "set", tmp_path / "set")
    for path in (tmp_path / "photographs").rglob("*.jpg"):
        path.write_bytes(PNG)
    (tmp_path / "set" / "shards-00001.tar").unlink()
    assert prepare(tmp_path, tmp_path / "set") == 4
    assert "shards-00001.tar was lost, and regenerating it gives different bytes" in capsys.readouterr().err
    assert not (tmp_path / "set" / "shards-00001.tar").exists()


def test_a_damaged_index_is_regenerated(made, tmp_path, capsys):
    shutil.copytree(made / "set", tmp_path / "set")
    os.truncate(tmp_path / "set" / SAMPLES, 100)
    assert prepare(made, tmp_path / "set") == 0 and tree(tmp_path / "set") == tree(made / "set")
