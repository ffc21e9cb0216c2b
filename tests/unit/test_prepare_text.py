"""``diffmoe prepare text``: images as they are stored, captions and text features, with the same bytes on any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.data.prepare import records
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import CheckpointError
from tests.helpers.data import PNG, photographs, tiny_vae, tree, write_tar
from tests.helpers.encoders import tiny_encoder

COUNT = 11
COLOURS = ("red", "green", "blue")


def name_of(path: Path) -> str:
    return f"a {COLOURS[len(path.stem) % 3]} car {path.stem}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photographs with one or two captions each, and what one rank makes from them."""
    folder = tmp_path_factory.mktemp("made")
    for number, path in enumerate(sorted(photographs(folder / "photographs", COUNT, size=24).rglob("*.jpg"))):
        second = "\nin the house\n" if number % 2 else ""
        path.with_suffix(".txt").write_text(f"{name_of(path)}{second}")
    prepare(folder / "one", folder)
    return folder


def prepare(out: Path, made: Path, *options: str, code: int = 0) -> None:
    """Text features of two encoders, in shards of four images."""
    encoders = ["--encoder", str(tiny_encoder("t5")), "--encoder", str(tiny_encoder("clip")), "--tokens", "8"]
    arguments = ["--images", str(made / "photographs"), *encoders, "--shard-images", "4", "--batch-size", "3"]
    assert main(["prepare", "text", *arguments, "--out", str(out), *options]) == code


def as_rank(monkeypatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def opened(folder: Path) -> ShardDataset:
    return ShardDataset(expand(folder))


def test_images_captions_and_features(made):
    dataset = opened(made / "one")
    paths = {path.relative_to(made / "photographs").with_suffix("").as_posix(): path
             for path in made.rglob("photographs/*/*.jpg")}  # fmt: skip
    assert len(dataset) == COUNT and {dataset.key(i) for i in range(COUNT)} == set(paths)
    encoders = TextEncoders([str(tiny_encoder("t5")), str(tiny_encoder("clip"))], torch.device("cpu"), 8)
    assert dataset.text == encoders.format
    counts = set()
    for index in range(COUNT):
        path = paths[dataset.key(index)]
        assert dataset.image_bytes(index) == path.read_bytes() and dataset.labels[index] == int(path.parent.name[-1])
        captions = dataset.captions(index)
        assert captions == path.with_suffix(".txt").read_text().split("\n")[: len(captions)]
        stored = dataset.read_captions(index)
        assert [caption.text for caption in stored] == captions
        counts.add(len(captions))
        for found, expected in zip(stored, encoders.encode(captions), strict=True):
            for one, other in zip(found.features, expected.features, strict=True):
                np.testing.assert_allclose(one.tokens, other.tokens, atol=2e-3, rtol=2e-3)  # of fp16
                np.testing.assert_allclose(one.pooled, other.pooled, atol=2e-3, rtol=2e-3)
    assert counts == {1, 2}
    report = json.loads((made / "one" / "report.json").read_text())
    assert (report["captions"], report["truncated_captions"]) == (COUNT + COUNT // 2, 0)
    assert main(["prepare", "check", str(made / "one")]) == 0


def test_two_ranks_give_the_same_bytes(made, monkeypatch, tmp_path):
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        prepare(tmp_path / "two", made)
    assert tree(tmp_path / "two") == tree(made / "one")


def test_what_is_finished_is_kept_after_a_kill(made, monkeypatch, tmp_path):
    out = tmp_path / "out"
    as_rank(monkeypatch, 1, 2)
    prepare(out, made)
    as_rank(monkeypatch, 0, 1)
    (done,) = out.glob("*.tar")
    before = done.stat().st_mtime_ns
    (out / ".writing-shards-00000.tar-0123").write_bytes(b"half a shard")
    prepare(out, made)
    assert tree(out) == tree(made / "one") and done.stat().st_mtime_ns == before
    (out / "shards-00002.tar").unlink()
    prepare(out, made)
    assert tree(out) == tree(made / "one")


def test_prepared_latents_stay_byte_for_byte(made, tmp_path):
    vae = tiny_vae(tmp_path / "vae")
    latents, table = tmp_path / "latents", tmp_path / "captions.csv"
    images = str(made / "photographs")
    common = ["--size", "16", "--shard-images", "5"]
    assert main(["prepare", "latents", "--images", images, "--vae", str(vae), *common, "--out", str(latents)]) == 0
    source = opened(latents)
    prepare(tmp_path / "own", made, "--images", str(latents))
    own, direct = opened(tmp_path / "own"), opened(made / "one")
    captions = {direct.key(index): direct.captions(index) for index in range(COUNT)}
    assert {own.key(index): own.captions(index) for index in range(COUNT)} == captions, "latents keep their captions"
    rows = "".join(f"{source.key(index)}.jpg,a red car\n" for index in range(COUNT))  # the files that were encoded
    table.write_text(f"file_name,caption\n{rows}")
    prepare(tmp_path / "out", made, "--images", str(latents), "--captions", str(table))
    dataset = opened(tmp_path / "out")
    assert dataset.latents == source.latents and dataset.text is not None
    stored = {source.key(index): source.image_bytes(index) for index in range(COUNT)}
    assert {dataset.key(index): dataset.image_bytes(index) for index in range(COUNT)} == stored
    indices = [json.loads((folder / "index.json").read_text()) for folder in (latents, tmp_path / "out")]
    for key in ("latent_mean", "latent_std"):
        assert indices[1][key] == pytest.approx(indices[0][key], rel=1e-2, abs=1e-3)
    prepare(tmp_path / "again", made, "--images", str(tmp_path / "out"))  # captions of shards with text features
    assert opened(tmp_path / "again").captions(0) == ["a red car"]
    assert main(["prepare", "check", str(tmp_path / "again")]) == 0


def test_crops(made, tmp_path, capsys):
    prepare(tmp_path / "out", made, "--size", "16")
    dataset = opened(tmp_path / "out")
    assert {dataset[index].image.shape for index in range(COUNT)} == {(3, 16, 16)}
    prepare(tmp_path / "out", made, code=2)
    assert "was started with stored {'kind': 'images', 'size': 16}, got {'kind': 'stored'" in capsys.readouterr().err


def test_images_without_captions_are_listed_and_too_many_are_an_error(made, tmp_path, capsys):
    images = Path(shutil.copytree(made / "photographs", tmp_path / "photographs"))
    missing = sorted(images.rglob("*.txt"))[4]
    missing.unlink()
    prepare(tmp_path / "out", tmp_path, code=4)
    error = capsys.readouterr().err
    key = missing.relative_to(images).with_suffix("").as_posix()
    assert "1 of 11 images could not be read, more than --max-unreadable 0.01 allows" in error
    assert f"the first is '{key}': image {missing.with_suffix('.jpg')} has no caption; expected {missing}" in error
    named = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert [entry["key"] for entry in named] == [key] and "report.json names those found; repair them" in error
    shutil.copytree(tmp_path / "out", tmp_path / "repaired")
    missing.write_text("a car")
    prepare(tmp_path / "repaired", tmp_path)
    assert len(opened(tmp_path / "repaired")) == COUNT, "after a repair, the same command succeeds"
    missing.unlink()
    prepare(tmp_path / "out", tmp_path, "--max-unreadable", "0.1")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stored"] == COUNT - 1 and [entry["key"] for entry in report["skipped"]] == [key]
    assert len(opened(tmp_path / "out")) == COUNT - 1


def test_images_that_training_could_not_decode_are_listed(tmp_path, capsys):
    (tmp_path / "photographs").mkdir()
    for name, data in (("good.png", PNG), ("renamed.jpg", PNG), ("broken.png", PNG[:-30])):
        (tmp_path / "photographs" / name).write_bytes(data)
        (tmp_path / "photographs" / name).with_suffix(".txt").write_text("a car")
    prepare(tmp_path / "out", tmp_path, "--max-unreadable", "1")
    skipped = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert {entry["key"] for entry in skipped} == {"renamed", "broken"}
    assert any("does not start like a JPEG file" in entry["reason"] for entry in skipped)


def test_long_captions_are_counted(tmp_path, capsys):
    members = [("a.png", PNG), ("a.txt", f"{'red ' * 9}\na car".encode()), ("b.png", PNG), ("b.txt", b"pear")]
    write_tar(tmp_path / "raw.tar", members)
    prepare(tmp_path / "out", tmp_path, "--images", str(tmp_path / "raw.tar"))
    assert "1 of 3 captions have more tokens than an encoder reads" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["captions"], report["truncated_captions"]) == (3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "7"], "was started with text_encoders.1.tokens 8, got 7"),
        (["--batch-size", "4"], "was started with batch_size 3, got 4"),
        (["--encoder", "/nowhere"], "the text encoder /nowhere is neither a folder"),
        (["--tokens", "0"], "--tokens must be positive, got 0"),
        (["--captions", "/nowhere.txt"], "the captions /nowhere.txt must be a .csv or .jsonl file"),
    ],
)
def test_other_settings_are_refused(made, tmp_path, options, message, capsys):
    shutil.copytree(made / "one", tmp_path / "out")
    prepare(tmp_path / "out", made, *options, code=2)
    assert message in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(made / "one")


def test_another_table_of_captions_is_refused(made, tmp_path, capsys):
    table = tmp_path / "captions.jsonl"
    paths = sorted((made / "photographs").rglob("*.jpg"))
    names = [path.relative_to(made / "photographs").as_posix() for path in paths]
    table.write_text("\n".join(json.dumps({"file_name": name, "text": ["a car", "red"]}) for name in names))
    prepare(tmp_path / "out", made, "--captions", str(table))
    assert opened(tmp_path / "out").captions(3) == ["a car", "red"]
    table.write_text(table.read_text() + "\n")
    prepare(tmp_path / "out", made, "--captions", str(table), code=2)
    assert "was started with captions " in capsys.readouterr().err


def test_latents_cannot_be_cropped(made, tmp_path, capsys):
    latent = {"channels": 4, "size": 2, "image_size": 16, "dtype": "float16", "scaling_factor": 1.0,
              "shift_factor": 0.0, "vae": "0" * 64}  # fmt: skip
    write_tar(tmp_path / "a.tar", [("__latents__", json.dumps(latent).encode())])
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, np.zeros((2, 2, 4, 2, 2), np.float16))
    data = (tmp_path / "a.npy").read_bytes()
    write_tar(tmp_path / "a.tar", [("__latents__", json.dumps(latent).encode()), ("a.npy", data), ("a.txt", b"x")])
    prepare(tmp_path / "out", made, "--images", str(tmp_path / "a.tar"), "--size", "16", code=2)
    assert "--size is 16, but --images" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_records_with_invalid_text_are_refused(made, tmp_path, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    prepare(tmp_path / "out", made)
    (part,) = (tmp_path / "out" / "parts").glob("0*.json")
    record = json.loads(part.read_text())
    records.read_record(part)
    for change in ({"text": "AAAA"}, {"text": 3}, {"text": "?"}, {"captions": "x"}):
        part.write_text(json.dumps({**record, **change}))
        with pytest.raises(CheckpointError, match="cannot be read: "):
            records.read_record(part)
    older = {name: value for name, value in record.items() if name not in ("text", "captions", "truncated")}
    part.write_text(json.dumps(older))
    assert records.read_record(part) == older
