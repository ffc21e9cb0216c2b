"""Text models: layouts, resuming, and the caption of each position, as for class models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.data.shuffle import WholeShuffle
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.rng import caption_choice, training_draws
from tests.distributed.test_layout import TOLERANCE, assert_same
from tests.helpers.data import captioned_shard, text_features
from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import Trained, read_metrics, training_arguments, write_json

LAYOUTS = ((1, 1, 0), (2, 2, 2), (4, 2, 3))
IMAGES = 40


def train_text(
    tmp_path: Path, shard: Path, layout: tuple[int, int, int], images: int, *overrides: str,
    directory: Path | None = None,
) -> tuple[Trained, dict[int, tuple[bool, str]]]:  # fmt: skip
    """Train a text model on captions; also return (is dropped, features) of each position that was trained on."""
    name = f"{'-'.join(map(str, layout))}-{images}"
    world, ep, zero = layout
    directory = directory or tmp_path / name
    records = tmp_path / f"records of {directory.name}"
    config = write_json(tmp_path / f"{name}.json", ep, zero)
    text = ("model.conditioning=text", "model.label_dropout=0.4", f"data.path={shard}", f"run.total_images={images}")
    arguments = training_arguments(config, directory, *text, *overrides)
    finished = run_ranks(world, [str(WORKERS / "record_captions.py"), str(records), "train", *arguments])
    assert finished.code == 0, finished.output
    taken: dict[int, tuple[bool, str]] = {}
    for file in records.iterdir():
        for position, (is_dropped, row) in json.loads(file.read_text()).items():
            assert int(position) not in taken, "no position is trained on twice"
            taken[int(position)] = is_dropped, row
    return Trained(directory, read_metrics(directory), finished.output), taken


def expected(shard: Path, positions: range) -> dict[int, tuple[bool, str]]:
    """Return what `train_text` returns, from the run's seed alone."""
    dataset, found = ShardDataset([shard]), {}
    shuffle = WholeShuffle(0, len(dataset))
    for position in positions:
        draws = training_draws(0, position, (1, 32, 32), 0.4)
        (row,) = dataset.text_rows([shuffle(position)], [caption_choice(0, position)])
        found[position] = draws.drop, row.tobytes().hex()
    return found


@pytest.mark.slow
def test_two_ranks_evaluate_a_text_model_like_one(tmp_path):
    """Validation loss, metrics of generated images, grids with captions, and the loss of ``diffmoe evaluate``."""
    shard, held_out = captioned_shard(tmp_path / "a.tar", IMAGES), captioned_shard(tmp_path / "held_out.tar", 7)
    evaluated = (f"data.validation_path={held_out}", "eval.every_images=32", "sample.steps=2", "sample.num_images=4")
    more = ("run.sample_every_images=32", "eval.metrics=[frechet]", "eval.metric_images=5", "sample.cfg_scale=2")
    one, taken = train_text(tmp_path, shard, (1, 1, 0), 32, *evaluated, *more)
    two, also = train_text(tmp_path, shard, (2, 2, 2), 32, *evaluated, *more)
    assert_same(two, one)
    assert taken == also == expected(shard, range(32))
    rows = [read_metrics(run.directory, "validation.jsonl") for run in (one, two)]
    (ours,), (theirs,) = rows
    assert ours["validation_images"] == 7 and ours["metrics"]["n"] == 5
    assert theirs["validation_loss"] == pytest.approx(ours["validation_loss"], rel=TOLERANCE)
    assert theirs["metrics"]["frechet"] == pytest.approx(ours["metrics"]["frechet"], rel=1e-3)
    command = ["-m", "diffmoe_ds.cli", "evaluate", "--checkpoint", str(one.directory), "--validation", str(held_out)]
    loss = run_ranks(2, [*command, "--json"])
    (found,) = [json.loads(line) for line in loss.output.splitlines() if line.startswith("{")]
    assert loss.code == 0 and found["validation_images"] == 7
    assert found["validation_loss"] == pytest.approx(ours["validation_loss"], rel=TOLERANCE)
    grids = [np.asarray(Image.open(run.directory / "samples" / "images_000000000032.png")) for run in (one, two)]
    assert grids[0].shape == grids[1].shape and np.abs(grids[0].astype(int) - grids[1]).max() <= 1
    reader = CheckpointReader(newest_valid(one.directory, full=True))
    assert reader.text == text_features()
    null = torch.from_numpy(text_features().null_row).float()
    assert torch.equal(reader.read("buffer", "y_embedder.null_row", 0, len(null)), null)


@pytest.mark.slow
def test_every_layout_of_a_text_model_trains_and_resumes_the_same(tmp_path):
    """3 steps in one layout and 3 in the next: losses, weights, moments, EMA, and the caption of every position."""
    shard = captioned_shard(tmp_path / "a.tar", IMAGES)
    straight, taken = train_text(tmp_path, shard, LAYOUTS[0], 96)
    assert taken == expected(shard, range(96))
    assert straight.column("loss")[-1] < straight.column("loss")[0]
    assert len({row for position, (_, row) in taken.items()}) > IMAGES, "an image has several captions"
    halves = {layout: train_text(tmp_path, shard, layout, 48) for layout in LAYOUTS}
    for number, before in enumerate(LAYOUTS):
        half, first = halves[before]
        directory = shutil.copytree(half.directory, tmp_path / f"moved_{number}")
        moved, second = train_text(tmp_path, shard, LAYOUTS[(number + 1) % 3], 96, directory=directory)
        assert "at 48 images, resharding: " in moved.output, before
        assert {**first, **second} == taken and not first.keys() & second.keys()
        assert_same(moved, straight)
