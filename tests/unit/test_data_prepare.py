"""Preparation: the same bytes on any number of ranks, finished work is kept, settings are recorded and checked."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffmoe_ds.cli import main
from diffmoe_ds.cli import prepare as prepare_cli
from diffmoe_ds.data.prepare import run as prepare_run
from diffmoe_ds.data.prepare.progress import Progress
from diffmoe_ds.data.sources import index_files
from diffmoe_ds.data.sources.images import centre_crop, open_rgb
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.vae import VAE
from tests.helpers.data import PNG, image_file, photographs, tiny_vae, tree, write_tar

COUNT, SIZE = 23, 16


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photographs in three class folders, a VAE, and the latents that one rank makes from them."""
    folder = tmp_path_factory.mktemp("made")
    photographs(folder / "photographs", COUNT, size=24)
    tiny_vae(folder / "vae")
    prepare(folder / "one", folder)
    return folder


def prepare(out: Path, made: Path, *options: str, code: int = 0) -> None:
    """Latents of the fixture's photographs, in shards of five."""
    arguments = ["prepare", "latents", "--images", str(made / "photographs"), "--vae", str(made / "vae")]
    arguments += ["--size", str(SIZE), "--shard-images", "5", "--batch-size", "2", "--out", str(out)]
    assert main([*arguments, *options]) == code


def as_rank(monkeypatch, rank: int, world: int) -> None:
    """Ranks need not run at the same time: they coordinate only through the directory."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def test_latents_match_the_vae(made):
    dataset, vae = ShardDataset(expand(made / "one")), VAE(str(made / "vae"))
    assert len(dataset) == COUNT and dataset.latents.shape == (4, 4, 4)
    keys = [dataset.key(i) for i in range(COUNT)]
    names = {p.relative_to(made / "photographs").with_suffix("").as_posix() for p in made.rglob("*.jpg")}
    assert set(keys) == names and keys != sorted(keys), "classes are mixed across the shards"
    for index in (0, 7, COUNT - 1):
        assert dataset.labels[index] == int(keys[index][6])
        crop = centre_crop(open_rgb((made / "photographs" / f"{keys[index]}.jpg").read_bytes()), SIZE)
        for mirror in (False, True):
            expected = vae.moments(np.ascontiguousarray(crop[None, :, :, ::-1] if mirror else crop[None]))
            found = dataset.latents.decode(dataset.read_moments([index], [mirror]))
            np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)  # stored in fp16
    index = json.loads((made / "one" / "index.json").read_text())
    assert index["classes"] == ["class-0", "class-1", "class-2"] and index["latents"]["scaling_factor"] == 0.5
    assert dataset.classes == index["classes"]
    assert ShardDataset(expand(made / "one"), unlabelled=True).classes is None


def test_webdataset_reads_them_too(made):
    pattern = str(made / "one" / "shards-{00000..00004}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode())
    assert len(samples) == COUNT
    assert {sample["npy"].shape for sample in samples} == {(2, 2, 4, 4, 4)}
    assert sorted(sample["cls"] for sample in samples) == sorted(number % 3 for number in range(COUNT))


def test_four_ranks_give_the_same_bytes(made, monkeypatch, tmp_path):
    for rank in (3, 1, 2, 0):
        as_rank(monkeypatch, rank, 4)
        prepare(tmp_path / "four", made)
    assert tree(tmp_path / "four") == tree(made / "one")


def test_what_is_finished_is_kept(made, monkeypatch, tmp_path, capsys):
    """Two of three ranks finished and the third was killed while writing: one rank does the rest, and only the rest."""
    out = tmp_path / "out"
    for rank in (1, 2):
        as_rank(monkeypatch, rank, 3)
        prepare(out, made)
    as_rank(monkeypatch, 0, 1)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(kept) == ["shards-00001.tar", "shards-00002.tar", "shards-00004.tar"]
    (out / ".writing-shards-00000.tar-0123").write_bytes(b"half a shard")
    (out / "parts" / "00004.json").unlink()  # killed between the shard and its record
    prepare(out, made)
    assert tree(out) == tree(made / "one")
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [name for name in kept if again[name] != kept[name]] == ["shards-00004.tar"]
    prepare(out, made)
    assert "is complete already" in capsys.readouterr().out and tree(out) == tree(made / "one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "20"], "was started with size 16, got 20; use the same setting, or a new directory"),
        (["--dtype", "float32"], "was started with dtype float16, got float32"),
        (["--shard-images", "6"], "was started with shard_images 5, got 6"),
        (["--unlabelled"], "was started with keys_and_labels "),
        (["--size", "18"], "--size must be a positive multiple of 4 for this VAE, got 18."),
        (["--vae", "/nowhere"], "the VAE /nowhere is neither a folder with a diffusers VAE"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0."),
        (["--max-unreadable", "2"], "--max-unreadable must be between 0 and 1, got 2.0."),
    ],
)
def test_other_settings_are_refused(made, tmp_path, options, message, capsys):
    shutil.copytree(made / "one", tmp_path / "out")
    prepare(tmp_path / "out", made, *options, code=2)
    assert message in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(made / "one")


@pytest.mark.parametrize("finished", (False, True))
def test_of_two_launches_with_different_settings_the_later_one_is_refused(
    made, monkeypatch, tmp_path, capsys, finished
):
    """Both find an empty directory; one is suspended while it writes its settings."""
    fsync, out = os.fsync, tmp_path / "out"

    def overtaken(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        with monkeypatch.context() as patch:
            if not finished:
                patch.setattr(prepare_cli, "run", lambda *_: None)
            prepare(out, made, "--size", "20")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", overtaken)
    prepare(out, made, code=2)
    assert "was started with size 20, got 16; use the same setting" in capsys.readouterr().err
    prepare(out, made, "--size", "20")
    assert not list(out.glob(".writing-*"))


def test_another_vae_or_directory_is_refused(made, tmp_path, capsys):
    other = tiny_vae(tmp_path / "vae", scaling_factor=0.7)
    prepare(made / "one", made, "--vae", str(other), code=2)
    assert "was started with vae " in capsys.readouterr().err
    prepare(made / "photographs" / "out", made, code=2)
    assert "is inside --images" in capsys.readouterr().err and not (made / "photographs" / "out").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    prepare(tmp_path / "notes", made, code=2)
    assert "holds other files, such as a.txt" in capsys.readouterr().err


def test_a_vae_that_needs_unpickling_is_refused(made, tmp_path, capsys):
    shutil.copytree(made / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "vae" / "diffusion_pytorch_model.bin")
    prepare(tmp_path / "out", made, "--vae", str(tmp_path / "vae"), code=2)
    error = capsys.readouterr().err
    assert "cannot be loaded by diffusers' AutoencoderKL" in error and "Traceback" not in error


def test_settings_of_a_vae_have_defaults_and_are_checked(made, tmp_path, capsys):
    """The first VAEs of Stable Diffusion have no scaling_factor."""
    shutil.copytree(made / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in tree.items() if key != "scaling_factor"}))
    assert VAE(str(tmp_path / "vae")).format(SIZE, "float16").scaling_factor == 0.18215
    invalid = (
        ("scaling_factor", "x"),
        ("scaling_factor", 0),
        ("shift_factor", []),
        ("latent_channels", "4"),
        ("latent_channels", 10**12),
        ("layers_per_block", 10**12),  # diffusers would build them
        ("block_out_channels", [10**12]),
    )
    for key, value in invalid:
        config.write_text(json.dumps({**tree, key: value}))
        prepare(tmp_path / "out", made, "--vae", str(tmp_path / "vae"), code=2)
        assert f"has an invalid {key} in its config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pipelines_vae_is_found(made, tmp_path):
    shutil.copytree(made / "vae", tmp_path / "pipeline" / "vae")
    prepare(tmp_path / "out", made, "--vae", str(tmp_path / "pipeline"))
    assert tree(tmp_path / "out") == tree(made / "one")


def test_unreadable_images_are_listed_and_too_many_are_an_error(tmp_path, capsys):
    images = photographs(tmp_path / "photographs", 9, size=24)
    (images / "class-1" / "bad.jpg").write_bytes(b"")
    common = ["prepare", "images", "--images", str(images), "--size", "16", "--shard-images", "4"]
    assert main([*common, "--out", str(tmp_path / "strict")]) == 4
    assert "1 of 10 images could not be read, more than --max-unreadable 0.01 allows" in capsys.readouterr().err
    assert not (tmp_path / "strict" / "index.json").exists()
    assert main([*common, "--out", str(tmp_path / "strict"), "--max-unreadable", "0.1"]) == 0
    report = json.loads((tmp_path / "strict" / "report.json").read_text())
    assert (report["images"], report["stored"]) == (10, 9)
    assert report["skipped"] == [{"key": "class-1/bad", "reason": "ValueError: the file is empty"}]
    dataset = ShardDataset(expand(tmp_path / "strict"))
    assert len(dataset) == 9 and dataset[0].image.shape == (3, 16, 16)


def test_from_shards_without_labels(tmp_path):
    grey = np.arange(600, dtype=np.uint8).reshape(20, 30)
    members = [(f"{number}.png", image_file(grey + number)) for number in range(6)]
    write_tar(tmp_path / "raw-0.tar", members[:3])
    write_tar(tmp_path / "raw-1.tar.gz", members[3:])
    pattern = str(tmp_path / "raw-{0.tar,1.tar.gz}")
    assert main(["prepare", "images", "--images", pattern, "--size", "8", "--out", str(tmp_path / "out")]) == 0
    dataset = ShardDataset(expand(tmp_path / "out"))
    assert sorted(dataset.key(i) for i in range(6)) == list("012345") and set(dataset.labels.tolist()) == {-1}


def test_check_tells_a_complete_dataset_from_a_damaged_one(made, tmp_path, capsys):
    assert main(["prepare", "check", str(made / "one"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == COUNT and report["per_class"] == {"0": 8, "1": 8, "2": 7} and not report["problems"]
    index = json.loads((made / "one" / "index.json").read_text())
    assert report["latent_std"] == pytest.approx(index["latent_std"], rel=1e-3)
    assert report["latent_mean"] == pytest.approx(index["latent_mean"], abs=1e-3)
    assert all("standard deviation" in note for note in report["notes"]) and len(report["notes"]) <= 1

    shutil.copytree(made / "one", tmp_path / "bad")
    shard = tmp_path / "bad" / "shards-00002.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    (tmp_path / "bad" / "shards-00001.tar").unlink()
    assert main(["prepare", "check", str(tmp_path / "bad")]) == 4
    printed = capsys.readouterr()
    assert "shard shards-00002.tar has the sha256" in printed.out and "shard shards-00001.tar is missing" in printed.out
    assert "is damaged or incomplete: shard shards-00002.tar" in printed.err


def test_check_finds_duplicate_keys_and_bad_samples_in_any_shards(tmp_path, capsys):
    good = image_file(np.zeros((4, 4), np.uint8))
    write_tar(tmp_path / "a.tar", [("k.png", good), ("k.cls", b"0"), ("m.png", PNG[:-30]), ("m.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("k.png", good), ("k.cls", b"5")])
    assert main(["prepare", "check", str(tmp_path), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["duplicate_keys"] == ["k"] and report["per_class"] == {"0": 1, "1": 1, "5": 1}
    assert len(report["problems"]) == 2 and "sample 'm' of shard" in report["problems"][0]


def test_shards_whose_records_could_not_be_read_are_refused(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffmoe_ds.data.prepare.preparation.MAX_SHARD_IMAGES", 4)
    prepare(tmp_path / "out", made, code=2)
    assert "--shard-images must be at most 4, got 5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rank_0_notices_missing_ranks(made, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    as_rank(monkeypatch, 0, 2)
    prepare(out, made, "--timeout", "1", code=4)  # rank 1 was never started
    assert "rank(s) 1 finished no shard within 1 s, and 2 of 5 shards are missing" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["Progress.advance", "write_shard", "finish"])
def test_another_launch_into_the_same_directory_may_finish_first(made, monkeypatch, tmp_path, moment, capsys):
    owner = Progress if moment == "Progress.advance" else prepare_run
    name = moment.rpartition(".")[2]
    original = getattr(owner, name)

    def overtaken(*arguments):
        monkeypatch.setattr(owner, name, original)
        prepare(tmp_path / "out", made)
        return original(*arguments)

    monkeypatch.setattr(owner, name, overtaken)
    prepare(tmp_path / "out", made)
    assert "is complete already" in capsys.readouterr().out
    as_rank(monkeypatch, 1, 2)  # starts when everything is done
    prepare(tmp_path / "out", made)
    assert tree(tmp_path / "out") == tree(made / "one") and not (tmp_path / "out" / "parts").exists()


def test_a_full_disk_gives_a_one_sentence_error(made, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(index_files, "write_array", full)
        prepare(tmp_path / "out", made, code=5)
    assert "index-samples.npy: cannot be written: No space left on device" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", full)
        patched.setattr(Path, "write_text", full)  # so the other ranks cannot be told either
        prepare(tmp_path / "out", made, code=5)
    error = capsys.readouterr().err
    assert "shards-00000.tar: cannot be written: No space left" in error and "Traceback" not in error
    prepare(tmp_path / "out", made)
    assert tree(tmp_path / "out") == tree(made / "one")


def test_one_rank_per_host_reports_an_error_that_all_hit(monkeypatch, capsys):
    monkeypatch.setattr(prepare_cli, "REPORT_TIME", 0)
    for rank, said in ((0, 1), (1, 0)):
        as_rank(monkeypatch, rank, 2)
        assert main(["prepare", "images", "--images", "/nowhere", "--out", "/nowhere/out"]) == 4
        assert capsys.readouterr().err.count("no shard /nowhere exists") == said
