"""Unreadable images during training: replaced by the next position's, counted, and limited."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.reader import Unreadable
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.rng import training_draws
from diffmoe_ds.training import batches
from tests.helpers.data import image_file, write_tar
from tests.helpers.training import read_metrics, training_arguments, write_json

SHAPE = (1, 8, 8)


def shard(path: Path, count: int, damaged: tuple[int, ...]) -> Path:
    """Write gray images whose value is their number and whose label is their number modulo 4."""
    members = []
    for number in range(count):
        png = b"no picture" if number in damaged else image_file(np.full(SHAPE[1:], number, np.uint8))
        members += [(f"{number:04d}.png", png), (f"{number:04d}.cls", b"%d" % (number % 4))]
    return write_tar(path, members)


def read(path: Path, world: int, workers: int = 0, count: int = 3) -> tuple[torch.Tensor, list[int], list[str]]:
    """Return pixels and labels by position, over all ranks, and the problems."""
    x, labels, problems = {}, {}, []
    for rank in range(world):
        settings = LoaderSettings(
            seed=5, global_batch=8, micro_batch=8 // world, accumulation=1, rank=rank, world=world, image_shape=SHAPE,
            num_classes=4, num_workers=workers, replaces_unreadable=True,
        )  # fmt: skip
        draws = partial(training_draws, 5, shape=SHAPE, label_dropout=0.1, flip=False)
        loader = iter(PositionLoader(ShardDataset([path]), settings, draws))
        for _ in range(count):
            batch = next(loader)
            problems += [each.problem for each in batch.unreadable]
            for row, position in enumerate(batch.position.tolist()):
                x[position], labels[position] = batch.x[row], int(batch.label[row])
    order = sorted(x)
    assert order == list(range(8 * count))
    return torch.stack([x[position] for position in order]), [labels[position] for position in order], problems


def test_the_next_position_replaces_an_unreadable_image(tmp_path):
    """In every layout; pixels and label belong together, and all other positions are unchanged."""
    whole, _, none = read(shard(tmp_path / "whole.tar", 24, ()), 1)
    path = shard(tmp_path / "damaged.tar", 24, (7, 8))
    x, labels, problems = read(path, 1)
    assert not none and len(problems) == 2 and all("cannot be decoded" in problem for problem in problems)
    numbers = [round(float(image.mean() + 1) * 127.5) for image in x]
    before = [round(float(image.mean() + 1) * 127.5) for image in whole]
    assert sorted(before) == list(range(24)) and labels == [number % 4 for number in numbers]
    for position, number in enumerate(before):
        if number in (7, 8):
            assert numbers[position] not in (7, 8)
            assert numbers[position] == next(n for n in [*before[position:], *numbers] if n not in (7, 8))
        else:
            assert numbers[position] == number
    for world, workers in ((2, 0), (4, 0), (1, 1)):
        again = read(path, world, workers)
        assert torch.equal(again[0], x) and again[1] == labels and sorted(again[2]) == sorted(problems)


def test_a_set_without_readable_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be decoded"):
        read(shard(tmp_path / "all.tar", 4, (0, 1, 2, 3)), 1)


def test_few_unreadable_images_are_named_once_and_many_stop_the_run(tmp_path, capsys):
    config = write_json(tmp_path / "ds.json", ep=1, zero=0)
    few = shard(tmp_path / "few.tar", 100, (3,))
    length = ("run.total_images=208", "model.input_size=8", "model.patch_size=4")
    arguments = training_arguments(config, tmp_path / "few", f"data.path={few}", *length, "model.num_classes=auto")
    assert main(["train", *arguments]) == 0
    error = capsys.readouterr().err
    assert error.count("sample '0003'") == 1, "in two passes"
    assert "the next image replaces it (rank 0, 1 of 1 allowed)" in error

    many = shard(tmp_path / "many.tar", 100, (3, 50))
    arguments = training_arguments(config, tmp_path / "many", f"data.path={many}", *length, "model.num_classes=auto")
    assert main(["train", *arguments]) == 4
    error = capsys.readouterr().err
    assert "; 2 unreadable images of 100, but data.max_unreadable 0.01 allows 1" in error
    saved = CheckpointReader(newest_valid(tmp_path / "many", full=True)).images
    assert saved == read_metrics(tmp_path / "many")[-1]["images"]
    assert main(["train", *arguments, "data.max_unreadable=0.02"]) == 0
    assert main(["train", *arguments, "data.max_unreadable=0", "run.total_images=400"]) == 4


def test_ranks_count_distinct_unreadable_images_together(monkeypatch, capsys):
    """Rank 0 of two finds images 3 and 9, rank 1 finds 3 and 5: three, of which rank 0 names two."""
    failures: list[DataError | None] = []
    monkeypatch.setattr(batches, "get_rank", lambda: 0)
    monkeypatch.setattr(batches, "all_reduce", lambda tensor, op: tensor.clamp(min=2))
    monkeypatch.setattr(batches, "all_gather", lambda mine: [mine, others])
    monkeypatch.setattr(batches, "vote", lambda device, failure: failures.append(failure))
    images = batches.UnreadableImages(0.04, 100, torch.device("cpu"))
    others = torch.tensor([3, 5])
    assert images.add((Unreadable(9, "nine"), Unreadable(3, "three"), Unreadable(9, "nine")))
    images.exchange()
    printed = capsys.readouterr().err
    assert "three; the next image replaces it (rank 0, 1 of 4 allowed)" in printed
    assert "nine; the next image replaces it (rank 0, 2 of 4 allowed)" in printed and printed.count("WARNING") == 2

    assert not images.add((Unreadable(5, "five"),)), "rank 1 found it"
    others = torch.tensor([6, 7])
    images.exchange()
    assert images.add((Unreadable(8, "eight"),))
    others = torch.tensor([-1, -1])
    images.exchange()
    assert failures[:2] == [None, None]
    assert str(failures[2]) == "eight; 6 unreadable images of 100, but data.max_unreadable 0.04 allows 4"
