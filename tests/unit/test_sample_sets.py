"""Sets of generated images: the files of an unfinished set, and the results."""

from __future__ import annotations

import argparse
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe_ds.cli import sample_run
from diffmoe_ds.cli.capacity import print_capacity
from diffmoe_ds.cli.sample import add_sample_arguments
from diffmoe_ds.cli.sample_images import ImageSet
from diffmoe_ds.cli.sample_set import open_set
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import CheckpointError, ConfigError, LaunchError
from diffmoe_ds.sampling.observer import CapacityMeter
from diffmoe_ds.sampling.output import check_folder, is_png_folder, write_labels, write_npz, write_pngs
from diffmoe_ds.sampling.turns import Turn, split
from diffmoe_ds.sampling.unfinished import UnfinishedSet
from tests.helpers.sampling import write_random_model
from tests.unit.test_generate import config_of, model_of

SETTINGS = {"steps": 50, "classes": (1, 2), "guidance_interval": None}
COUNTS = np.array([[3, 2, 4], [0, 5, 4]])
"""Two layers of two experts, four tokens."""


def pixels_of(count: int, channels: int = 1, size: int = 4) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", (1, 3))
def test_the_streamed_npz_has_the_bytes_of_savez(tmp_path, channels):
    images, labels = pixels_of(10, channels), np.arange(10, dtype=np.int64)
    np.savez(tmp_path / "expected.npz", arr_0=images, arr_1=labels)
    parts = iter((images[:4], images[4:9], images[9:]))
    write_npz(tmp_path / "streamed.npz", images.shape, parts, labels)
    assert (tmp_path / "streamed.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


def test_the_npz_is_written_in_the_memory_of_one_part(tmp_path):
    part = np.zeros((10, 128, 128, 3), np.uint8)
    labels = np.zeros(400, np.int64)
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", (400, 128, 128, 3), (part for _ in range(40)), labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < part.nbytes < (tmp_path / "samples.npz").stat().st_size / 39
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (400, 128, 128, 3)


@pytest.mark.parametrize("channels", (1, 3))
def test_png_files_sort_by_index_and_hold_the_pixels(tmp_path, channels):
    images = pixels_of(3, channels)
    write_pngs(tmp_path, range(9, 12), images, num_images=12)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000009.png", "000010.png", "000011.png"]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture).reshape(image.shape), image)
    write_labels(tmp_path, [4, 2])
    assert (tmp_path / "labels.csv").read_text() == "file,label\n000000.png,4\n000001.png,2\n"


def test_a_folder_of_the_user_is_not_replaced(tmp_path):
    check_folder(tmp_path / "png")
    (tmp_path / "png").mkdir()
    check_folder(tmp_path / "png")
    write_labels(tmp_path / "png", [0])
    write_pngs(tmp_path / "png", range(1), pixels_of(1), 1)
    check_folder(tmp_path / "png")
    assert is_png_folder(tmp_path / "png")
    (tmp_path / "png" / "holiday.png").touch()
    assert_not_replaced(tmp_path / "png")
    (tmp_path / "png" / "holiday.png").unlink()
    (tmp_path / "png" / "labels.csv").write_text("file,label,camera\n")
    assert_not_replaced(tmp_path / "png")
    (tmp_path / "png" / "labels.csv").unlink()
    assert_not_replaced(tmp_path / "png")
    (tmp_path / "png" / "png").touch()
    assert_not_replaced(tmp_path / "png" / "png")


def assert_not_replaced(path):
    assert not is_png_folder(path)
    with pytest.raises(ConfigError, match="exists but was not written by diffmoe; pass another --out or move it away"):
        check_folder(path)


@pytest.mark.parametrize("error", (PermissionError, NotADirectoryError))
def test_a_folder_that_cannot_be_read_is_not_replaced(monkeypatch, tmp_path, error):
    def fail(path):
        raise error

    (tmp_path / "png").mkdir()
    monkeypatch.setattr(Path, "iterdir", fail)
    assert_not_replaced(tmp_path / "png")


@pytest.mark.parametrize("is_file", (False, True))
def test_other_formats_keep_what_the_user_named_png(tmp_path, is_file):
    images = ImageSet(1, 0, (0,), "cycle", tmp_path, "npz")
    if is_file:
        (tmp_path / "png").touch()
    else:
        (tmp_path / "png").mkdir()
        (tmp_path / "png" / "labels.csv").write_text("photo,label\n")
    made = open_set(images, dict, 1, False, OneProcess())
    made.files.write(made.shards[0], pixels_of(1), COUNTS)
    made.assemble()
    assert {path.name for path in tmp_path.iterdir()} == {"png", "samples.npz", "grid.png"}
    assert is_file or (tmp_path / "png" / "labels.csv").read_text() == "photo,label\n"


class OneProcess:
    """The rendezvous of a single process."""

    launch = Launch(0, 1, 0, 1, "a test")

    def on_main(self, name: str, action) -> None:
        action()

    def check_same(self, name: str, text: str, message: str) -> None:
        pass

    def raise_on_all_ranks(self, name: str, action):
        return action()


def started(out, settings=SETTINGS, shard_images: int = 2) -> UnfinishedSet:
    files = UnfinishedSet(out)
    files.open(settings, shard_images)
    return files


def test_an_unfinished_set_continues_with_the_same_settings_only(tmp_path):
    shards = split(5, 2)
    first = started(tmp_path)
    pixels = pixels_of(2)
    first.write(shards[1], pixels, COUNTS)
    again = started(tmp_path, shard_images=3)
    assert again.shard_images() == 2
    assert again.finished(shards) == [False, True, False] and np.array_equal(again.read(shards[1]), pixels)
    for name, value in (("steps", 250), ("classes", (1,)), ("guidance_interval", (0.1, 0.5))):
        with pytest.raises(ConfigError) as caught:
            started(tmp_path, {**SETTINGS, name: value})
        message = str(caught.value)
        assert f"--{name.replace('_', '-')} " in message and "another --out, or remove" in message, message
    with pytest.raises(ConfigError, match="started with --steps 50, got None"):
        started(tmp_path, {key: value for key, value in SETTINGS.items() if key != "steps"})
    again.remove()
    assert not list(tmp_path.iterdir())
    assert len({files.identity() for files in (first, again, started(tmp_path))}) == 3, (
        "other hosts can tell them apart"
    )


def test_the_counts_of_all_shards_are_summed_also_next_to_shards_of_an_earlier_version(capsys, tmp_path):
    made = open_set(ImageSet(5, 0, (0,), "cycle", tmp_path, "npz"), dict, 2, False, OneProcess())
    for shard in made.shards:
        made.files.write(shard, pixels_of(len(shard.images)), COUNTS)
    total, counted = made.counted()
    assert total.tolist() == (3 * COUNTS).tolist() and counted == 5
    print_capacity(total, counted, 5, 1.5)
    assert (
        capsys.readouterr().out.split(maxsplit=1)[1]
        == "1.25 experts per token (requested 1.5; per layer 1.25 to 1.25)\n"
    )
    first = made.files._path(made.shards[0])
    np.save(first, pixels_of(2))  # as an earlier version wrote it
    total, counted = made.counted()
    assert total.tolist() == (2 * COUNTS).tolist() and counted == 3
    print_capacity(total, counted, 5, None)
    assert "over 3 of 5 images, the others were not counted by an earlier version)" in capsys.readouterr().out
    assert np.array_equal(made.files.read(made.shards[0]), pixels_of(2))
    with open(first, "ab") as file:
        file.write(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match="is damaged; remove it and run the same command again"):
        made.counted()
    for shard in made.shards:
        np.save(made.files._path(shard), pixels_of(len(shard.images)))
    print_capacity(*made.counted(), 5, None)
    assert not capsys.readouterr().out


def test_a_model_without_layers_of_experts_is_not_counted(tmp_path):
    made = open_set(ImageSet(4, 0, (0,), "cycle", tmp_path, "npz"), dict, 2, False, OneProcess())
    for shard in made.shards:
        made.files.write(shard, np.zeros((2, 8, 8, 1), np.uint8), np.zeros((0, 2), np.int64))
    assert not made.counted()[0].any()
    made.assemble()
    assert (tmp_path / "samples.npz").exists()


def test_discarded_images_are_not_counted(tmp_path):
    meter = CapacityMeter(model_of(config_of("batch_pool")))

    def generate() -> np.ndarray:
        meter.counts += 1
        return pixels_of(2)

    made = open_set(ImageSet(4, 0, (0,), "cycle", tmp_path, "npz"), dict, 4, True, OneProcess())
    (shard,), parts = made.shards, []
    for turn in (Turn(range(2), shard, 4), Turn(range(4, 6), None, 2), Turn(range(2, 4), shard, 4)):
        made._take(turn, parts, generate, meter)
    total, counted = made.counted()
    assert counted == 4 and total.tolist() == torch.full_like(meter.counts, 2).tolist()


def test_a_set_without_finished_shards_guards_nothing(tmp_path):
    started(tmp_path)
    other = started(tmp_path, {"steps": 1})
    other.discard_if_empty()
    assert not tmp_path.exists() and UnfinishedSet(tmp_path).identity() == "not found"


@pytest.mark.parametrize("damage", (b"", b"\x93NUMPY", pixels_of(3).tobytes()))
def test_damaged_shards_and_manifests_give_one_sentence(tmp_path, damage):
    files, (shard,) = started(tmp_path), split(2, 2)
    with pytest.raises(CheckpointError, match="is missing; --out must be on a file system that all ranks share"):
        files.read(shard)
    files.write(shard, pixels_of(2), COUNTS)
    (path,) = files.folder.glob("*.npy")
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match="is damaged; remove it and run the same command again"):
        files.read(shard)
    (files.folder / "manifest.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read; remove"):
        files.shard_images()
    with pytest.raises(ConfigError, match=r"manifest\.json is missing or damaged; pass another --out or move it away"):
        started(tmp_path)
    assert path.read_bytes() == damage


@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    (
        ((9, 8, 1), COUNTS, "its images have the shape"),
        ((8, 8, 7), COUNTS, "is damaged"),
        ((0, 8, 1), COUNTS, "is damaged"),
        ((8, 8, 1), COUNTS[:, :1], "its counts have the shape"),
        ((8, 8, 1), COUNTS[:0], "its counts have the shape"),
        ((8, 8, 1), COUNTS[:, :0], "is damaged"),
    ),
)
def test_shards_of_other_shapes_give_one_sentence(tmp_path, shape, counts, message):
    made = open_set(ImageSet(4, 0, (0,), "cycle", tmp_path, "npz"), dict, 2, False, OneProcess())
    made.files.write(made.shards[0], np.zeros((2, 8, 8, 1), np.uint8), COUNTS)
    made.files.write(made.shards[1], np.zeros((2, *shape), np.uint8), counts)
    with pytest.raises(CheckpointError, match=message):
        made.counted()
        made.assemble()


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("thesis.tex", "mine"),
        ("images-00000000-00000002.npy", "mine"),
        (".writing-notes/thesis.tex", "mine"),
        ("manifest.json", '{"settings": {}, "shard_images": 2, "id": "mine"}'),
    ),
)
def test_an_unfinished_folder_of_the_user_is_neither_used_nor_removed(tmp_path, name, content):
    path = tmp_path / "unfinished" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (tmp_path / "unfinished" / "notes").touch()
    with pytest.raises(ConfigError, match="unfinished exists but is not an unfinished set of diffmoe"):
        started(tmp_path)
    assert path.read_text() == content


def test_the_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "unfinished").touch()
    with pytest.raises(CheckpointError) as caught:
        started(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'unfinished'}: cannot be written: Not a directory."


def test_what_a_run_killed_at_its_start_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / ".writing-manifest.json-0").touch()
    files = started(tmp_path)
    assert [path.name for path in files.folder.iterdir()] == ["manifest.json"]


def test_the_shards_of_two_sets_do_not_mix(tmp_path):
    """For example if the manifest was replaced by that of a set in another directory."""
    first, other, (shard,) = started(tmp_path / "first"), started(tmp_path / "other"), split(2, 2)
    first.write(shard, pixels_of(2), COUNTS)
    (other.folder / "manifest.json").replace(first.folder / "manifest.json")
    assert started(tmp_path / "first").finished([shard]) == [False]


def test_a_rank_that_cannot_see_the_files_of_rank_0_is_reported(tmp_path):
    class SecondHost:
        """The rendezvous of rank 1, while rank 0 writes to a directory of the same name on another host."""

        launch = Launch(1, 2, 0, 1, "a test")

        def on_main(self, name: str, action: object) -> None:
            pass

        def check_same(self, name: str, text: str, message: str) -> None:
            if text != identity:
                raise LaunchError(f"rank 1 on second {message}")

        def raise_on_all_ranks(self, name: str, action):
            return action()

    images = ImageSet(7, 0, (0,), "cycle", tmp_path / "out", "npz")
    identity = started(tmp_path / "elsewhere").identity()
    for prepare in (lambda: None, lambda: started(images.out)):  # no directory, or one of an earlier run
        prepare()
        with pytest.raises(LaunchError, match=r"rank 1 on second cannot see what rank 0 writes to --out "):
            open_set(images, dict, 3, False, SecondHost())
    identity = started(images.out).identity()
    assert len(open_set(images, dict, 3, False, SecondHost()).shards) == 4, "of the two images that rank 0 chose"


def test_an_error_before_the_first_shard_leaves_nothing_behind(monkeypatch, tmp_path):
    class TwoProcesses(OneProcess):
        """The rendezvous of rank 0 of 2."""

        launch = Launch(0, 2, 0, 1, "a test")

    def fail(*_: object) -> None:
        raise LaunchError("no connection")

    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    model = write_random_model(tmp_path / "model")
    args = parser.parse_args(["--checkpoint", str(model), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sample_run, "resolve_launch", lambda: TwoProcesses.launch)
    monkeypatch.setattr(sample_run, "join_ranks", lambda launch: TwoProcesses())
    monkeypatch.setattr(sample_run, "naming_lost_ranks", lambda rendezvous: nullcontext())
    monkeypatch.setattr(sample_run, "create_groups", fail)
    with pytest.raises(LaunchError, match="no connection"):
        sample_run.run_sampling(args)
    assert not (tmp_path / "out").exists()
