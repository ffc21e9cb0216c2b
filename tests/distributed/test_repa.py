"""REPA in text models: layouts and resuming, as without it."""

from __future__ import annotations

import shutil

import pytest

from diffmoe_ds.checkpoint.load import PROJECTOR
from tests.distributed.test_layout import TOLERANCE, assert_same, tensors
from tests.distributed.test_text import IMAGES, LAYOUTS, train_text
from tests.helpers.data import FEATURES, captioned_shard

REPA = ("loss.repa_weight=0.5", "loss.repa_hidden=24")


def test_two_ranks_train_with_repa_like_one(tmp_path):
    """The fast one, with activation checkpointing."""
    shard = captioned_shard(tmp_path / "a.tar", IMAGES, features=FEATURES)
    one, taken = train_text(tmp_path, shard, (1, 1, 0), 32, *REPA)
    two, also = train_text(tmp_path, shard, (2, 2, 2), 32, *REPA, "model.activation_checkpointing=true")
    assert_same(two, one)
    assert taken == also and two.column("repa_loss") == pytest.approx(one.column("repa_loss"), abs=TOLERANCE)
    assert sum(PROJECTOR in name for name in tensors(one)) == 4 * 6  # weights, two moments and EMA of three layers


@pytest.mark.slow
def test_every_layout_trains_and_resumes_the_same_with_repa(tmp_path):
    """3 steps in one layout and 3 in the next: losses, weights, moments and EMA."""
    shard = captioned_shard(tmp_path / "a.tar", IMAGES, features=FEATURES)
    straight, taken = train_text(tmp_path, shard, LAYOUTS[0], 96, *REPA)
    halves = {layout: train_text(tmp_path, shard, layout, 48, *REPA) for layout in LAYOUTS}
    for number, before in enumerate(LAYOUTS):
        half, first = halves[before]
        directory = shutil.copytree(half.directory, tmp_path / f"moved_{number}")
        moved, second = train_text(tmp_path, shard, LAYOUTS[(number + 1) % 3], 96, *REPA, directory=directory)
        assert "at 48 images, resharding: " in moved.output, before
        assert {**first, **second} == taken
        assert_same(moved, straight)
        assert moved.column("repa_loss") == pytest.approx(straight.column("repa_loss"), abs=TOLERANCE)
