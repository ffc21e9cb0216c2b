"""Guidance in an interval of noise levels and by a second model, with every sampler."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import write_model
from diffmoe_ds.checkpoint.stream import Entry
from diffmoe_ds.cli.sample import add_sample_arguments
from diffmoe_ds.cli.sampling_plan import SamplingPlan, determining_settings, plan_sampling, sources
from diffmoe_ds.config.load import load_config
from diffmoe_ds.diffusion.objective import SAMPLERS
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe import expert_ffn, top_k
from diffmoe_ds.sampling.fields import IntervalField
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.guidance import check_guide, guide_by_model
from diffmoe_ds.sampling.labels import cycle_labels
from diffmoe_ds.sampling.samplers import sample
from tests.helpers.sampling import write_random_model
from tests.unit.test_generate import config_of, model_of


def per_token_model(objective: str = "flow") -> DiT:
    model = model_of(config_of("batch_pool", objective))
    model.set_inference("per_token")
    return model


def weaker_model(objective: str = "flow", **model: object) -> DiT:
    """Return a second model with other weights and no row for "no label"."""
    weak = model_of(config_of("token_choice", objective, label_dropout=0, **model))
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.7)
    return weak


def generated(model: DiT, guide: DiT | None = None, seeds: range = range(3), **settings: object) -> torch.Tensor:
    settings = {"sampler": "euler", "steps": 4, "cfg_scale": 2.0, **settings}
    path = None if guide is None else "a second model"
    return generate(
        model,
        cycle_labels(seeds, range(model.config.model.num_classes)),
        seeds,
        SamplingSettings(**settings, autoguidance=path),
        guide=guide,
    )


# ------------------------------------------------------------------------------------------------------ interval


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_runs_only_inside_the_interval(sampler):
    """Noise levels decrease from 1 to 0; outside the interval, a single conditional pass runs."""
    is_flow, levels = SAMPLERS[sampler] == "flow", {"guided": [], "plain": []}

    def model_fn(name: str):
        def predict(x, t_B):
            levels[name].append(1 - t_B[0].item() if is_flow else t_B[0].item() / 1000)
            return x if is_flow else torch.cat([x, x], 1)

        return predict

    field = IntervalField(model_fn("guided"), model_fn("plain"), 0.3, 0.6)
    z = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    sample(field, sampler, z, 20, lambda: torch.zeros_like(z))
    assert levels["guided"] and levels["plain"]
    assert all(0.3 - 1e-6 <= level <= 0.6 + 1e-6 for level in levels["guided"])
    assert any(level > 0.6 for level in levels["plain"]) and any(level < 0.3 for level in levels["plain"])
    if sampler != "dopri5":
        assert not any(0.3 + 1e-6 < level < 0.6 - 1e-6 for level in levels["plain"])


@pytest.mark.parametrize(("low", "high", "guided"), ((0.2, 1.0, range(9)), (0.3, 0.7, range(3, 8))))
def test_the_interval_includes_its_ends_despite_rounding(low, high, guided):
    """Step i of 10 is at noise level 1 - i / 10, and 1 - 0.8 is less than 0.2 in floating point."""
    steps = []

    def inside(x, t_B):
        steps.append(round(10 * t_B[0].item()))
        return x

    sample(IntervalField(inside, lambda x, t_B: x, low, high), "euler", torch.zeros(1, 1, 2, 2), 10)
    assert steps == list(guided)


def is_guided(sampler: str, steps: int, interval: tuple[float, float]) -> bool:
    """Return whether a sampler evaluates the model inside the interval."""
    out_channels, calls = 1 if SAMPLERS[sampler] == "flow" else 2, []

    def guided(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        calls.append(t_B)
        return plain(x, t_B)

    def plain(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, out_channels, 1, 1)

    noise = torch.zeros(1, 1, 2, 2)
    sample(IntervalField(guided, plain, *interval), sampler, noise, steps, lambda: noise)
    return bool(calls)


@pytest.mark.parametrize(
    ("sampler", "steps", "outside", "inside", "nearest"),
    [
        ("euler", 4, (0.1, 0.2), (0.1, 0.25), "the nearest is 0.25"),
        ("heun", 2, (0.1, 0.4), (0.0, 0.4), "the nearest are 0 and 0.5"),  # evaluates at the end of the last step, too
        ("sde", 3, (0.1, 0.5), (0.1, 0.52), "the nearest are 0.04 and 0.52"),
        ("ddpm", 2, (0.3, 0.7), (0.3, 1.0), "the nearest are 0 and 0.999"),
        ("ddim", 2, (0.3, 0.7), (0.0, 0.7), "the nearest are 0 and 0.999"),
        ("dpm", 3, (0.01, 0.3), (0.01, 0.302), "the nearest are 0 and 0.302"),
    ],
)
def test_an_interval_without_a_noise_level_of_the_sampler_is_rejected(sampler, steps, outside, inside, nearest):
    config = config_of("dense", SAMPLERS[sampler])

    def settings(interval: tuple[float, float]) -> SamplingSettings:
        return SamplingSettings(sampler, steps, cfg_scale=2, guidance_interval=interval)

    settings(inside).check(config)
    with pytest.raises(ConfigError, match=f"{steps}, got {outside[0]:g} {outside[1]:g}; {nearest}"):
        settings(outside).check(config)
    assert is_guided(sampler, steps, inside) and not is_guided(sampler, steps, outside)


def test_an_interval_of_adaptive_steps_is_not_checked():
    SamplingSettings("dopri5", 2, cfg_scale=2, guidance_interval=(0.3, 0.31)).check(config_of("dense"))


def test_interval_of_every_image_where_their_times_differ():
    """For dopri5 only: both predictions are computed, and each image uses its own."""
    import numpy as np

    field = IntervalField(lambda x, t_B: x + 1, lambda x, t_B: x - 1, 0.3, 0.6)
    images = field(torch.zeros(3, 1, 1, 1), torch.zeros(3), np.array([0.1, 0.3, 0.7]))
    assert images.flatten().tolist() == [-1, 1, -1]


def test_whole_interval_is_plain_guidance_and_passes_are_saved_elsewhere():
    model, sizes = per_token_model(), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = generated(model, guidance_interval=(0.0, 1.0))
    assert sizes == [6, 6, 6, 6] and torch.equal(whole, generated(model))
    sizes.clear()
    some = generated(model, guidance_interval=(0.4, 0.8))
    assert sizes == [3, 6, 6, 3] and not torch.equal(some, whole)


# -------------------------------------------------------------------------------------------------- autoguidance


@pytest.mark.parametrize(("kind", "guide_channels", "G"), [("flow", None, 4), ("flow", 3, 3), ("ddpm", None, 3)])
def test_autoguidance_extrapolates_from_the_weaker_model_with_the_same_label(kind, guide_channels, G):
    x, t, y = torch.randn(2, 4, 2, 2), torch.rand(2), torch.tensor([3, 5])
    outputs = 4 if kind == "flow" else 8
    strong, weak = torch.randn(2, outputs, 2, 2), torch.randn(2, outputs, 2, 2)

    def forward(prediction):
        def predict(x_BCHW, t_B, y_B):
            assert y_B is y and x_BCHW is x and t_B is t
            return prediction

        return predict

    forwards = (forward(strong), forward(weak))
    out = guide_by_model(forwards, y, 2.5, kind, 4, guide_channels)(x, t)
    torch.testing.assert_close(out[:, :G], (weak + 2.5 * (strong - weak))[:, :G])
    assert torch.equal(out[:, G:], strong[:, G:])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_autoguided_images_do_not_depend_on_their_batch_mates(sampler):
    model, weak = per_token_model(SAMPLERS[sampler]), weaker_model(SAMPLERS[sampler])
    options = {"sampler": sampler, "guidance_interval": (0.1, 0.9)}
    together = generated(model, weak, **options)
    alone = torch.cat([generated(model, weak, seeds=range(i, i + 1), **options) for i in range(3)])
    scale = together.abs().max()
    torch.testing.assert_close(together / scale, alone / scale, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together / scale, generated(model, **options) / scale, rtol=1e-3, atol=1e-3)


def test_lost_rows_of_either_model_are_computed_again(monkeypatch):
    model, weak = per_token_model(), per_token_model()
    with torch.no_grad():
        weak.final_layer.linear.weight.mul_(0.5)
    expected = generated(model, weak)
    monkeypatch.setattr(expert_ffn, "GROUPED", {("cpu", torch.float32)})
    monkeypatch.setattr(top_k, "_local_kth_key", top_k.sorted_kth_key)
    weak.assumed_capacities = 0.1
    torch.testing.assert_close(generated(model, weak), expected, rtol=1e-4, atol=1e-4)
    assert weak.assumed_capacities == 0.2


def test_guidance_mistakes():
    config = config_of("batch_pool")

    def settings(**changes: object) -> SamplingSettings:
        return SamplingSettings(**{"sampler": "euler", "steps": 4, "cfg_scale": 2.0, **changes})

    for changes, message in (
        ({"guidance_interval": (0.2, 0.8), "cfg_scale": 1.0}, "--guidance-interval needs guidance; set --cfg-scale"),
        ({"autoguidance": "path", "cfg_scale": 1.0}, "--autoguidance needs guidance; set --cfg-scale"),
        ({"guidance_interval": (0.8, 0.2)}, "0 <= LOW < HIGH <= 1, got 0.8 0.2"),
        ({"guidance_interval": (float("nan"), 1.0)}, "0 <= LOW < HIGH <= 1, got nan 1.0"),
        ({"guide_channels": 9}, "--guide-channels must be all or a number from 1 to"),
        ({"sampler": "ddim"}, "--sampler must be euler, heun, dopri5 or sde for a flow model"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(**changes).check(config)
    without_null = config_of("batch_pool", label_dropout=0)
    with pytest.raises(ConfigError, match="must be 1 for a model trained with"):
        settings().check(without_null)
    settings(autoguidance="path").check(without_null)
    for other, message in (
        (
            config_of("dense", "ddpm"),
            "--autoguidance W: objective.kind must be 'flow' as in the guided model, got 'ddpm'",
        ),
        (config_of("dense", num_classes=7), "model.num_classes must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_guide(other, config, "--autoguidance W")
    check_guide(config_of("dense", label_dropout=0), config, "--autoguidance W")


# ------------------------------------------------------------------------------------------------- sampling plan


def plan_of(model: Path, *options: str) -> SamplingPlan:
    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    args = parser.parse_args(["--checkpoint", str(model), "--out", "out", *options])
    return plan_sampling(args, Launch(0, 1, 0, 1, "a test"))


def settings_of(plan: SamplingPlan) -> dict[str, object]:
    return determining_settings(plan, torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> Path:
    """A guiding model whose images compete within their batch."""
    folder = tmp_path_factory.mktemp("guide")
    weak = DiT(load_config("fashion", ["model.name=nano-E4", "model.patch_size=8", "routing.capacity_predictor=false"]))
    entries = [Entry(name, tuple(t.shape), torch.float32, [t]) for name, t in weak.state_dict().items()]
    write_model(folder, entries, Description(weak.config), "raw", images=16)
    return folder


def test_a_guiding_model_whose_images_compete_fixes_the_batch_size(model, guide):
    assert not plan_of(model).images_compete and "batch_size" not in settings_of(plan_of(model))
    alike = plan_of(model, "--cfg-scale", "2", "--autoguidance", str(model))
    assert alike.guide is not None and not alike.images_compete
    plan = plan_of(model, "--cfg-scale", "2", "--autoguidance", str(guide))
    assert plan.images_compete and settings_of(plan)["batch_size"] == 50


def test_the_ranks_agree_on_the_guiding_model_and_its_weights(model, guide):
    plans = [plan_of(model, "--cfg-scale", "2", "--autoguidance", str(path)) for path in (model, guide)]
    assert plans[1].guide is not None
    plans += [plan_of(model), replace(plans[1], guide=replace(plans[1].guide, kind="ema")), replace(plans[1], kind="x")]
    assert len({sources(plan) for plan in plans}) == 5
    assert sources(plan_of(model, "--seed", "1")) == sources(plan_of(model))


@pytest.mark.parametrize(
    ("options", "others", "same"),
    (
        ((), ("--guide-channels", "all"), True),
        (("--cfg-scale", "2"), ("--cfg-scale", "2", "--guide-channels", "1"), True),
        (("--sampler", "dopri5"), ("--sampler", "dopri5", "--steps", "9"), True),
        (("--sampler", "dopri5"), ("--sampler", "dopri5", "--atol", "1e-6"), True),
        (("--sampler", "dopri5"), ("--sampler", "dopri5", "--atol", "1e-5"), False),
        ((), ("--steps", "9"), False),
    ),
)
def test_options_without_an_effect_do_not_block_a_resume(model, options, others, same):
    assert (settings_of(plan_of(model, *options)) == settings_of(plan_of(model, *others))) is same
