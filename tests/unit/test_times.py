"""Distributions of the training times: their moments, monotony and limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.sections import ObjectiveConfig
from diffmoe_ds.diffusion.times import logit_normal, shifted
from diffmoe_ds.training.loss import training_times

DRAWS = (torch.arange(20_000) + 0.5) / 20_000
"""Evenly spaced draws from [0, 1)."""


@pytest.mark.parametrize(("mean", "std"), ((0.0, 1.0), (0.8, 0.5), (-1.0, 2.0)))
def test_the_logit_of_the_noise_level_is_normal(mean, std):
    noise = 1 - logit_normal(DRAWS.double(), mean, std)
    logit = torch.logit(noise)
    assert logit.mean() == pytest.approx(mean, abs=1e-3) and logit.std() == pytest.approx(std, rel=1e-3)


@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(0.1, 10))
def test_times_are_monotone_and_in_range(mean, std, shift):
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for times in (logit_normal(edges, mean, std), shifted(edges, shift)):
        assert (times.diff() >= 0).all() and times.min() >= 0 and times.max() <= 1 and times.dtype == torch.float32


def test_shifting_multiplies_the_odds_of_noise():
    times = DRAWS[::100].double()
    odds, shifted_odds = ((1 - t) / t for t in (times, shifted(times, 3.0)))
    torch.testing.assert_close(shifted_odds, 3 * odds)
    assert shifted(times, 3.0).mean() < times.mean()


def test_a_recipe_chooses_the_distribution():
    assert training_times(DRAWS, ObjectiveConfig()) is DRAWS, "old runs keep their times, bit by bit"
    both = ObjectiveConfig(time_distribution="logit_normal", time_mean=0.5, time_std=0.7, time_shift=2)
    assert torch.equal(training_times(DRAWS, both), shifted(logit_normal(DRAWS, 0.5, 0.7), 2))


def test_keys_without_effect_are_known():
    assert ObjectiveConfig(time_distribution="logit_normal", time_mean=0.5, flow_time_scale=1000).unused == ()
    assert ObjectiveConfig(time_mean=0.5, time_std=0.7, time_shift=2).unused == ("time_mean", "time_std")
    ddpm = load_config("fashion", ["objective.kind=ddpm"]).objective
    assert ddpm.unused == ("flow_time_scale", "time_distribution", "time_mean")
