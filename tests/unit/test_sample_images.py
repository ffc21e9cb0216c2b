"""Which images ``diffmoe sample`` generates, with which labels, and their assignment to shards and ranks."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.cli.sample import add_sample_arguments
from diffmoe_ds.cli.sample_images import choose_images
from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.data.sources.shards import EMBEDDED_CLASSES
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.rng import image_stream, label_stream
from diffmoe_ds.sampling.labels import cycle_labels, random_labels
from diffmoe_ds.sampling.turns import MAX_SHARDS, deal, images_per_shard, rounds, split


def choose(*options: str, num_classes: int = 10, names: tuple[str, ...] | None = EMBEDDED_CLASSES) -> object:
    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    config = config_from_dict({"model": {"name": "nano-E4", "num_classes": num_classes}}, "a test")
    reader = SimpleNamespace(config=config, class_names=names, path=Path("model"))
    return choose_images(parser.parse_args(["--checkpoint", "model", "--out", "out", *options]), reader)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--classes", "10"], "--classes must be from 0 to 9 for this model, got 10."),
        (["--classes=-1"], "--classes must be from 0 to 9 for this model, got -1."),
        (
            ["--classes", "sneeker"],
            "--classes: 'sneeker' is not known; did you mean 'sneaker'? valid: 0 to 9, or T-shirt",
        ),
        (["--classes=3,--5"], "--classes: '--5' is not known; valid: 0 to 9, or T-shirt"),
        (["--classes", "9" * 5000], "99' is not known; valid: 0 to 9, or T-shirt"),
        (
            ["--classes", "1,,2"],
            "--classes '1,,2': a class is empty; separate labels or names by one comma, as in 1,2.",
        ),
        (["--classes", " ,"], "--classes ' ,': a class is empty"),
        (["--classes", "7,sneaker"], "--classes 7,sneaker: class 7 is repeated."),
        (["--per-class", "2", "--num-images", "4"], "--per-class 2 and --num-images 4 contradict each other"),
        (["--per-class", "2", "--labels", "random"], "--per-class 2 and --labels random contradict each other"),
        (["--seed", "-1", "--num-images", "1"], "--seed must be from 0 to 18446744073709551614 with 1 image, got -1."),
        (["--seed", "-1"], "--seed must be from 0 to 18446744073709551536 with 40 images, got -1."),
        (["--per-class", "1", "--seed", str(2**64)], "with 10 images, got 18446744073709551616."),
    ),
)
def test_mistakes_in_the_choice_of_images(options, message):
    with pytest.raises(ConfigError) as caught:
        choose(*options)
    assert message in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_message_lists_the_first_names_only():
    names = tuple(f"breed {number}" for number in range(120))
    with pytest.raises(ConfigError, match=r"'cat' is not known; valid: 0 to 119, or breed 0, .*, breed 11, \.\.\.\.$"):
        choose("--classes", "cat", num_classes=120, names=names)


def test_classes_without_names_or_without_classes():
    with pytest.raises(ConfigError, match="'bag' is not known; the checkpoint does not record class names; valid"):
        choose("--classes", "bag", names=None)
    with pytest.raises(ConfigError, match="--classes 0: model was trained without classes; omit the option"):
        choose("--classes", "0", num_classes=1)
    with pytest.raises(ConfigError, match=r"'bag' is not known; .*valid: 0 to 4"):
        choose("--classes", "bag", num_classes=5)  # label 8, which the model lacks
    assert choose("--per-class", "3", num_classes=1).num_images == 3


def test_labels_cycle_over_the_chosen_classes_or_are_uniform():
    assert cycle_labels(range(2, 7), (5, 0, 3)).tolist() == [3, 5, 0, 3, 5]
    labels = random_labels(range(4000), (5, 0, 3)).tolist()
    assert labels[1000:1003] == random_labels(range(1000, 1003), (5, 0, 3)).tolist(), "a function of the seed alone"
    counts = Counter(labels)
    assert counts.keys() == {0, 3, 5} and all(abs(n - 4000 / 3) < 5 * 30 for n in counts.values())
    pairs = Counter(pairwise(labels))
    assert all(abs(n - 4000 / 9) < 5 * 20 for n in pairs.values()), "neighbors are independent"
    assert label_stream(7).random() != image_stream(7).random()


@pytest.mark.parametrize(("num_images", "batch_size"), ((40, 50), (50_000, 50), (50_000, 7), (1, 1), (100_001, 100)))
def test_shards_are_whole_batches_and_few(num_images, batch_size):
    per_shard = images_per_shard(num_images, batch_size)
    shards = split(num_images, per_shard)
    assert per_shard % batch_size == 0 and len(shards) <= MAX_SHARDS
    assert [image for shard in shards for image in shard.images] == list(range(num_images))
    assert per_shard == batch_size or len(shards) > MAX_SHARDS / 2, "no larger than needed"


@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    per_shard=st.integers(1, 9),
    world=st.integers(1, 5),
    in_step=st.booleans(),
    data=st.data(),
)
def test_every_missing_image_is_dealt_once_in_batches_that_do_not_depend_on_the_ranks(
    num_images, batch_size, per_shard, world, in_step, data
):
    shards = split(num_images, per_shard)
    finished = data.draw(st.lists(st.booleans(), min_size=len(shards), max_size=len(shards)))
    groups = rounds(shards, finished, world, in_step)
    turns = [list(deal(groups, batch_size, rank, in_step, num_images)) for rank in range(world)]
    kept = [turn.images for own in turns for turn in own if turn.shard is not None]
    alone = deal(rounds(shards, finished, 1, False), batch_size, 0, False, num_images)
    missing = {turn.images for turn in alone}
    assert missing <= set(kept) and len(set(kept)) == len(kept), "batches are those of one process"
    assert in_step or missing == set(kept)
    for row in zip_longest(*turns):
        assert None not in row, "all ranks have equally many turns"
        sizes = {len(turn.images) for turn in row}
        assert not in_step or len(sizes) == 1, "ranks that share experts generate batches of the same size"
        everywhere = sum(len(turn.images) for turn in row if turn.shard is not None)
        assert {turn.images_everywhere for turn in row} == {everywhere} and everywhere > 0
        assert all(turn.images.start >= num_images for turn in row if turn.images and turn.shard is None)
    for own in turns:
        done = [turn.shard.number for turn in own if turn.completes_shard]
        assert len(done) == len(set(done)) == len({turn.shard for turn in own if turn.shard is not None})


def test_ranks_in_step_repeat_the_rounds_of_an_uninterrupted_run():
    """What ranks compute together affects rounding, so a round is repeated as it was."""
    shards = split(10, 2)
    finished = [True, True, True, False, False]
    numbers = [[shard.number for shard in group] for group in rounds(shards, finished, 2, in_step=True)]
    assert numbers == [[2, 3], [4]]
    assert [[s.number for s in group] for group in rounds(shards, finished, 2, in_step=False)] == [[3, 4]]
