"""Validation loss: fixed draws, equal noise levels, and independence from batches and ranks."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.data.dataset import open_source
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.diffusion.objective import NOISE_BINS, make_objective, noise_bin
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation.held_out import HeldOut, open_held_out
from diffmoe_ds.evaluation.validation_loss import ValidationLoss, validation_loss
from diffmoe_ds.rng import held_out_draws
from tests.helpers.data import numbered_shard
from tests.unit.test_generate import model_of

SHAPE = (1, 32, 32)
MODEL = {"name": "nano-E4", "patch_size": 8, "in_channels": 1, "num_classes": 10}


def config_of(kind: str = "batch_pool", objective: str = "flow", **model: object):
    tree = {"model": {**MODEL, **model}, "routing": {"kind": kind}, "objective": {"kind": objective}}
    return config_from_dict(tree, "a test")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ShardDataset:
    return open_source(numbered_shard(tmp_path_factory.mktemp("held_out") / "shard.tar", 43))


def loss_of(model, held_out: HeldOut, batch_size: int, world: int = 1) -> ValidationLoss:
    """Compute the validation loss from the shares of `world` ranks, one after the other."""
    batches = [batch for rank in range(world) for batch in held_out.batches(batch_size, rank, world)]
    return validation_loss(model, make_objective(model.config.objective.kind), batches, len(held_out))


def test_draws_depend_on_the_position_only():
    once, again = (held_out_draws(7, SHAPE, NOISE_BINS, posterior=True) for _ in range(2))
    assert once.time == again.time and (once.noise == again.noise).all() and (once.posterior == again.posterior).all()
    other, plain = held_out_draws(8, SHAPE, NOISE_BINS), held_out_draws(7, SHAPE, NOISE_BINS)
    assert plain.time == once.time and (plain.noise == once.noise).all() and plain.posterior is None
    assert (other.noise != once.noise).mean() > 0.99
    assert not once.flip and not once.drop


@pytest.mark.parametrize("kind", ("flow", "ddpm"))
def test_every_noise_level_gets_one_of_ten_images(kind):
    """Also of every class, if classes repeat every 10 images, and within each level the times differ."""
    objective = make_objective(kind)
    times = torch.tensor([held_out_draws(position, SHAPE, NOISE_BINS).time for position in range(2000)])
    bins = noise_bin(objective.noise_level(objective.model_time(times))).view(-1, 10)
    assert (bins.sort(1).values == torch.arange(10)).all()
    by_class = torch.stack([torch.bincount(bins[:, label], minlength=10) for label in range(10)])
    assert by_class.min() > 5 and by_class.max() < 40  # 20 on average
    assert len(times.unique()) > 1900 and times.min() >= 0 and times.max() < 1


def test_the_edges_of_ddpm_timesteps_fall_into_the_right_bins():
    level = make_objective("ddpm").noise_level(torch.arange(1000))
    assert torch.equal(noise_bin(level), torch.arange(1000) // 100)


@pytest.mark.parametrize(("kind", "objective"), (("batch_pool", "flow"), ("token_choice", "ddpm"), ("dense", "flow")))
def test_batches_and_ranks_do_not_change_the_loss(dataset, kind, objective):
    config = config_of(kind, objective)
    model = model_of(config)
    model.set_inference(config.inference_choices[0])
    held_out = HeldOut(dataset, config)
    reference = loss_of(model, held_out, 43)
    assert reference.images == 43
    for batch_size, world in ((1, 1), (10, 1), (8, 2), (5, 4)):
        loss = loss_of(model, held_out, batch_size, world)
        assert loss.images == 43
        assert loss.mean == pytest.approx(reference.mean, rel=1e-5)
        assert loss.by_noise_level == pytest.approx(reference.by_noise_level, rel=1e-5)


def test_the_loss_is_the_mean_of_the_objective(dataset):
    """Image by image, with the draws of its position; the mean is over images, not over bins."""
    config = config_of("dense")
    model, objective = model_of(config), make_objective("flow")
    held_out = HeldOut(dataset, config)
    loss = loss_of(model, held_out, 16)
    found: dict[int, list[float]] = {}
    for position in range(43):
        draws = held_out_draws(position, SHAPE, NOISE_BINS)
        x = torch.from_numpy(np.pad(dataset[position].image, ((0, 0), (2, 2), (2, 2)))).float()[None] / 127.5 - 1
        noise, t = torch.from_numpy(draws.noise)[None], torch.tensor([draws.time])
        with torch.no_grad():
            velocity = model(t * x + (1 - t) * noise, t, torch.tensor([3])).prediction
        found.setdefault(int((1 - draws.time) * 10), []).append(objective.loss(velocity, x, noise, t)["loss_B"].item())
    every = [value for values in found.values() for value in values]
    assert loss.mean == pytest.approx(sum(every) / 43, rel=1e-5)
    expected = [sum(found[level]) / len(found[level]) for level in range(NOISE_BINS)]
    assert loss.by_noise_level == pytest.approx(expected, rel=1e-5)


def test_a_part_of_the_images_is_evenly_spaced(dataset):
    """The embedded and many other sets are sorted, so the first N are not representative."""
    held_out = HeldOut(dataset, config_of(), num_images=4)
    assert len(held_out) == 4
    (batch,) = held_out.batches(100)
    assert batch.position.tolist() == [0, 1, 2, 3]
    expected = [dataset[index].image[0, 0, 0] / 127.5 - 1 for index in (0, 10, 21, 32)]
    assert batch.x[:, 0, 16, 16].tolist() == pytest.approx(expected)
    assert not batch.drop.any()
    loss = loss_of(model_of(config_of("dense")), held_out, 3)
    assert loss.images == 4 and sum(map(math.isnan, loss.by_noise_level)) == 6
    assert len(HeldOut(dataset, config_of(), num_images=1000)) == 43


def test_images_that_do_not_fit_are_refused(dataset, tmp_path):
    with pytest.raises(DataError, match="has the label 3; the model has 3 classes, 0 to 2"):
        HeldOut(dataset, config_of(num_classes=3))
    small = HeldOut(dataset, config_of(input_size=16))
    with pytest.raises(DataError, match="the model takes 1 channel of at most 16x16"):
        next(small.batches(4))
    damaged = HeldOut(open_source(numbered_shard(tmp_path / "bad.tar", 9, damaged=5)), config_of())
    batches = damaged.batches(4)
    next(batches)
    with pytest.raises(DataError, match=r"sample '0005' of shard .* has a .png that cannot be decoded"):
        next(batches)


@pytest.mark.parametrize(
    ("evaluation", "path", "error", "message"),
    (
        ({"every_images": 100}, None, ConfigError, "eval.every_images is 100, but data.validation_path is not set"),
        ({"metrics": ["kid"]}, "good.tar", ConfigError, "eval.metrics is set, but eval.every_images is 0"),
        ({"every_images": 100}, "none.tar", DataError, "data.validation_path {path}: "),
        (
            {"every_images": 100},
            "one.tar",
            DataError,
            "data.validation_path {path}: evaluation needs at least 2 images",
        ),
        ({"every_images": 100}, "bad.tar", DataError, "data.validation_path {path}: sample '0000' of shard"),
    ),
)
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, evaluation, path, error, message):
    numbered_shard(tmp_path / "good.tar", 3)
    numbered_shard(tmp_path / "one.tar", 1)
    numbered_shard(tmp_path / "bad.tar", 3, damaged=0)
    data = {} if path is None else {"validation_path": str(tmp_path / path)}
    config = config_from_dict({"model": MODEL, "data": data, "eval": evaluation}, "a test")
    with pytest.raises(error, match=re.escape(message.format(path=data.get("validation_path")))):
        open_held_out(config)


def test_nothing_is_opened_for_a_run_that_does_not_evaluate():
    assert open_held_out(config_from_dict({"data": {"validation_path": "/nowhere"}}, "a test")) is None
