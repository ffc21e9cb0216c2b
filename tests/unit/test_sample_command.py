"""``diffmoe sample``: output files and interrupted runs."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe_ds.cli import main, sample_run, sample_set
from diffmoe_ds.data.sources.shards import EMBEDDED_CLASSES
from diffmoe_ds.sampling import stream
from diffmoe_ds.sampling.generate import SamplingSettings
from diffmoe_ds.sampling.grid import to_uint8
from diffmoe_ds.sampling.labels import random_labels
from diffmoe_ds.sampling.output import write_npz, write_pngs
from diffmoe_ds.sampling.unfinished import UnfinishedSet
from tests.helpers.sampling import sample, write_random_model

SEVEN = ("--num-images", "7", "--batch-size", "3", "--steps", "1")
"""Three shards, the last of which has one image."""


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def run(checkpoint: Path, out: Path, *options: str) -> int:
    return main(["sample", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def capacity_line(output: str) -> str:
    (line,) = (line for line in output.splitlines() if line.strip().startswith("capacity"))
    return line


def labels_of(out: Path) -> list[int]:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        labels: list[int] = file["arr_1"].tolist()
    return labels


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), EMBEDDED_CLASSES)


def test_the_class_is_chosen_apart_from_the_seed(capsys, model, tmp_path):
    """An image is the same in any set that gives it the same seed and class."""
    out = tmp_path / "out"
    first = sample(model, out, "--num-images", "4")
    assert labels_of(out) == [0, 1, 2, 3] and "\n4 images in " in capsys.readouterr().out
    later = sample(model, out, "--num-images", "2", "--seed", "2")
    assert labels_of(out) == [0, 1]
    chosen = sample(model, out, "--seed", "2", "--classes", "2, 3", "--per-class", "1")
    assert labels_of(out) == [2, 3]
    assert np.abs(chosen.astype(int) - first[2:]).max() <= 1 and not np.array_equal(later, chosen)
    sample(model, out, "--labels", "random", "--num-images", "6", "--seed", "5", "--classes", "1,4")
    assert labels_of(out) == random_labels(range(5, 11), (1, 4)).tolist() and set(labels_of(out)) == {1, 4}


def test_checkpoints_and_exported_models_record_the_names_of_classes(run_directory, tmp_path):
    """The run was trained on the embedded dataset."""
    exported, out = tmp_path / "exported", tmp_path / "out"
    sample(run_directory, out, "--classes", "Sneaker,BAG", "--per-class", "2")
    assert labels_of(out) == [7, 8, 7, 8]
    assert main(["checkpoint", "export", str(run_directory), "--out", str(exported)]) == 0
    sample(exported, out, "--classes", "ankle boot", "--num-images", "1")
    assert labels_of(out) == [9]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    (
        (["--per-class", "0"], 2, "--per-class or --per-prompt must be positive, got 0"),
        (["--out", "FILE"], 2, "--out FILE is a file; pass a directory."),
        (["--out", "FILE/out"], 5, "FILE/out: cannot create the directory: Not a directory"),
        (["--out", ".", "--format", "png"], 2, "png exists but was not written by diffmoe"),
        (["--out", "holiday"], 2, "holiday/grid.png is a directory; pass another --out or move it away."),
        (["--out", "party", "--format", "png"], 2, "party/samples.npz is a directory; pass another --out"),
    ),
)
def test_mistakes_in_the_output(capsys, monkeypatch, run_directory, tmp_path, options, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "holiday.png").touch()
    for folder in ("holiday/grid.png", "party/samples.npz"):
        (tmp_path / folder).mkdir(parents=True)
    with monkeypatch.context() as patch:
        if code == 2:
            patch.setattr(sample_run, "plan_sampling", None)  # found before the checkpoint is opened
        assert run(run_directory, tmp_path / "out", *options) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert names_in(tmp_path) == {"FILE", "png", "holiday", "party"} and names_in(tmp_path / "png") == {"holiday.png"}


def test_formats_and_what_an_earlier_run_left(capsys, run_directory, tmp_path):
    out = tmp_path / "out"
    assert run(run_directory, out, *SEVEN, "--format", "both") == 0
    said = capsys.readouterr().out
    assert "images_000000000096, ema weights, trained on 96 images" in said
    assert "euler, 1 step, guidance 1, routing per_token, fp32" in said
    assert names_in(out) == {"samples.npz", "png", "grid.png"}
    assert names_in(out / "png") == {"labels.csv", *(f"{index:06d}.png" for index in range(7))}
    with np.load(out / "samples.npz") as file, Image.open(out / "png" / "000006.png") as picture:
        assert np.array_equal(np.asarray(picture), file["arr_0"][6, :, :, 0])
    assert run(run_directory, out, "--num-images", "2", "--steps", "2", "--format", "png") == 0
    assert names_in(out) == {"png", "grid.png"} and len(names_in(out / "png")) == 3
    assert "guidance 1, routing" in capsys.readouterr().out
    guided = ("--cfg-scale", "2", "--guide-channels", "1")
    assert run(run_directory, out, "--num-images", "3", "--steps", "2", *guided) == 0
    assert "euler, 2 steps, guidance 2, in 1 of 1 channel, routing" in capsys.readouterr().out
    assert names_in(out) == {"samples.npz", "grid.png"} and labels_of(out) == [0, 1, 2]


def test_guidance_without_classes_gives_a_note(capsys, tmp_path):
    model = write_random_model(tmp_path / "model", overrides=["model.num_classes=1"])
    for scale, notes in (("1", 0), ("2", 1)):
        assert run(model, tmp_path / scale, "--num-images", "2", "--steps", "1", "--cfg-scale", scale) == 0
        assert capsys.readouterr().out.count("guidance hardly changes images of a model without classes") == notes


def kill_while_sampling(patch: pytest.MonkeyPatch) -> None:
    write, calls = UnfinishedSet.write, []

    def die(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        write(*arguments)

    patch.setattr(UnfinishedSet, "write", die)


def kill_while_writing_the_npz(patch: pytest.MonkeyPatch) -> None:
    def die(path: Path, shape: tuple[int, ...], parts: object, labels: np.ndarray) -> None:
        write_npz(path.with_name(".writing-half"), shape, parts, labels)
        raise Killed

    patch.setattr(sample_set, "write_npz", die)


def kill_while_writing_png_files(patch: pytest.MonkeyPatch) -> None:
    def die(folder: Path, images: range, pixels: np.ndarray, num_images: int) -> None:
        write_pngs(folder, images, pixels, num_images)
        (folder / "000002.png").write_bytes(b"half")
        raise Killed

    patch.setattr(sample_set, "write_pngs", die)


def kill_between_the_results(patch: pytest.MonkeyPatch) -> None:
    replace, calls = Path.replace, []

    def die(path: Path, target: Path) -> Path:
        if "unfinished" in target.parts:
            return replace(path, target)  # a complete shard or manifest
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return replace(path, target)

    patch.setattr(Path, "replace", die)


def kill_before_removing_the_shards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UnfinishedSet, "remove", raise_killed)


def kill_while_removing_the_shards(patch: pytest.MonkeyPatch) -> None:
    def die(files: UnfinishedSet) -> None:
        garbage = files.folder.rename(files.own / "garbage")
        next(garbage.glob("*.npy")).unlink()
        raise Killed

    patch.setattr(UnfinishedSet, "remove", die)


def raise_killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    ("kill", "finished"),
    (
        (kill_while_sampling, 2),
        (kill_while_writing_the_npz, 3),
        (kill_while_writing_png_files, 3),
        (kill_between_the_results, 3),
        (kill_before_removing_the_shards, 3),
        (kill_while_removing_the_shards, 0),
    ),
)
def test_a_killed_run_continues_and_writes_the_same_bytes(
    capsys, monkeypatch, model, tmp_path, kill: Callable[[pytest.MonkeyPatch], None], finished: int
):
    options = (*SEVEN, "--format", "both")
    assert run(model, tmp_path / "whole", *options) == 0
    capacity = capacity_line(capsys.readouterr().out)
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            run(model, out, *options)
    capsys.readouterr()
    assert run(model, out, *options) == 0
    said = capsys.readouterr().out
    assert capacity_line(said) == capacity, "of all images, not only of those generated since"
    assert (f"{finished} of 3 shards are finished" in said) or (finished == 0 and "resuming" not in said)
    expected = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*.*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == {*expected, Path("png")}
    for name, path in expected.items():
        assert (out / name).read_bytes() == path.read_bytes(), name


@pytest.fixture
def interrupted(monkeypatch, run_directory, tmp_path) -> Path:
    """An output directory with two of three shards finished, in which images compete within their batch."""
    with monkeypatch.context() as patch:
        kill_while_sampling(patch)
        with pytest.raises(Killed):
            run(run_directory, tmp_path / "out", *SEVEN, "--routing", "dynamic")
    return tmp_path / "out"


def test_other_arguments_do_not_continue_an_unfinished_set(capsys, run_directory, interrupted, tmp_path):
    same = (*SEVEN, "--routing", "dynamic")
    for options, difference in (
        (("--steps", "2"), "--steps 1, got 2"),
        (("--seed", "1"), "--seed 0, got 1"),
        (("--weights", "raw"), "--weights ema, got raw"),
        (("--classes", "1"), "--classes [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], got [1]"),
        (("--labels", "random"), "--labels cycle, got random"),
        (("--batch-size", "2"), "--batch-size 3, got 2"),
        (("--routing", "per_token"), "--routing dynamic, got per_token"),
        (
            ("--checkpoint", str(run_directory / "checkpoints" / "images_000000000032")),
            "--checkpoint images_0000000000",
        ),
    ):
        assert run(run_directory, interrupted, *same, *options) == 2
        error = capsys.readouterr().err
        assert f"started with {difference}" in error and "another --out, or remove" in error, error
    assert run(run_directory, interrupted, *same, "--format", "png") == 0, "not a setting of the images"


def test_the_batch_size_may_change_where_images_do_not_compete(capsys, monkeypatch, model, tmp_path):
    """For example after running out of memory; the shards remain those of the first run."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_while_sampling(patch)
        with pytest.raises(Killed):
            run(model, out, *SEVEN)
    assert run(model, out, *SEVEN, "--batch-size", "2") == 0
    assert "2 of 3 shards are finished" in capsys.readouterr().out
    with np.load(out / "samples.npz") as file:
        images = file["arr_0"].astype(int)
    assert np.abs(sample(model, tmp_path / "one", *SEVEN, "--steps", "1") - images).max() <= 1


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes fail beyond a size, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("limit", "left"), ((4000, True), (3000, False)), ids=("npz", "shard"))
def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(capsys, model, tmp_path, limit, left):
    out = tmp_path / "out"
    with file_size_limit(limit):
        assert run(model, out, *SEVEN) == 5
    error = capsys.readouterr().err
    assert "cannot be written: File too large." in error and "Traceback" not in error, error
    if left:
        assert names_in(out) == {"unfinished"}
        assert sorted(path.suffix for path in (out / "unfinished").iterdir()) == [".json", ".npy", ".npy", ".npy"]
    else:
        assert not out.exists()
    assert run(model, out, *SEVEN) == 0
    assert names_in(out) == {"samples.npz", "grid.png"}


def test_images_that_are_not_finite_keep_finished_shards(capsys, monkeypatch, model, tmp_path):
    def spoil(*arguments: object) -> object:
        images, seeds = generate(*arguments).clone(), arguments[2]
        if 6 in seeds:
            images[0, 0, 0, 0] = float("nan")
        return images

    out, generate = tmp_path / "out", stream.generate
    with monkeypatch.context() as patch:
        patch.setattr(stream, "generate", spoil)
        assert run(model, out, *SEVEN) == 3
    error = capsys.readouterr().err
    assert "error: the generated images contain NaN or Inf; try a smaller guidance scale than 1 or an earlier" in error
    assert names_in(out) == {"unfinished"} and len(list(out.rglob("*.npy"))) == 2
    assert run(model, out, *SEVEN) == 0
    assert names_in(out) == {"samples.npz", "grid.png"}


def test_latents_are_decoded_a_few_at_a_time():
    images, sizes = torch.rand(10, 4, 2, 2), []

    def decode(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    pixels = stream._decode(images, decode, SamplingSettings("euler", 1))
    assert pixels.shape == (10, 16, 16, 3) and np.array_equal(pixels, to_uint8(decode(images)))
    assert max(sizes[:-1]) == stream.DECODED_TOGETHER and sum(sizes[:-1]) == 10
