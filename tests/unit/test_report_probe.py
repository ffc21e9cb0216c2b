"""What a report measures: the routing of generated images, and the log files of a run."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from diffmoe_ds.evaluation.report.history import MAX_POINTS, read_history
from diffmoe_ds.evaluation.report.probe import LEVELS, NOISE_BINS, Images, Recorder, probe
from diffmoe_ds.evaluation.report.routing import class_capacity
from diffmoe_ds.model.dit import DiTOutput
from diffmoe_ds.moe.layer import Routing
from diffmoe_ds.sampling.generate import SamplingSettings
from tests.helpers.reports import random_model, report_config, write_run

LABELS = torch.tensor([0, 1, 2, 0, 1])


def run_probe(model, cfg_scale: float, steps: int = 4, heat_maps: int = 3, batch_size: int = 2):
    """Probe five images in batches of two, and return what every conditional pass selected as well."""
    passes = []

    def hook(module, inputs, output):
        x, t, y = inputs
        is_cond = y < module.config.model.num_classes
        masks = [routing.mask_TE.unflatten(0, (len(y), -1))[is_cond] for routing in output.routing]
        if is_cond.any():
            passes.append((x[is_cond], t[is_cond], torch.stack(masks) if masks else None))

    handle = model.register_forward_hook(hook)
    sampler = {"flow": "euler", "ddpm": "ddim"}[model.config.objective.kind]
    images = Images(LABELS, [5, 5, 5, 6, 6], heat_maps)
    found = probe(model, images, SamplingSettings(sampler, steps, cfg_scale), lambda x: x, batch_size)
    handle.remove()
    return found, passes


@pytest.mark.parametrize("cfg_scale", (1.0, 3.0))
@pytest.mark.parametrize(
    ("kind", "objective"),
    (("batch_pool", "flow"), ("batch_pool", "ddpm"), ("expert_choice", "flow"), ("token_choice", "flow")),
)
def test_counts_equal_the_masks_of_the_conditional_passes(kind, objective, cfg_scale):
    model = random_model(report_config(kind, objective))
    found, passes = run_probe(model, cfg_scale)
    assert len(passes) == 3 * 4, "three batches of four steps"
    tokens = sum(mask.sum((1, 2)) for _, _, mask in passes)
    assert found.tokens_LE.tolist() == tokens.tolist()
    taken = torch.cat([mask.sum(-1).flatten(1) for _, _, mask in passes], dim=1)
    expected = [torch.bincount(layer, minlength=5).tolist() for layer in taken]
    assert found.taken_LT.tolist() == expected
    assert found.capacity_NKL.shape == (5, NOISE_BINS, 2)
    batches = [passes[4 * number : 4 * number + 4] for number in range(3)]
    per_image = torch.cat([torch.stack([m.sum(-1).float().mean(2) for _, _, m in b]) for b in batches], dim=2)
    # four steps fall into four bins, from noise to clean
    np.testing.assert_allclose(np.nanmean(found.capacity_NKL, axis=1).T, per_image.mean(0), rtol=1e-6)
    seen = ~np.isnan(found.capacity_NKL[0, :, 0])
    np.testing.assert_allclose(found.capacity_NKL[:, seen][:, ::-1].transpose(1, 2, 0), per_image, rtol=1e-6)


def test_heat_maps_are_of_the_nearest_steps_and_of_the_first_images():
    model = random_model(report_config("batch_pool"))
    found, passes = run_probe(model, 1.0, steps=10)
    heat = found.heat_maps
    assert heat.experts_IVRQ.shape == (3, len(LEVELS), 4, 4) and heat.mean_IRQ.shape == (3, 4, 4)
    np.testing.assert_allclose(
        heat.level_IV, [(1.0, 0.8, 0.5, 0.3, 0.1)] * 3, atol=1e-6
    )  # steps start at 1, 0.9, ..., 0.1
    x, _, mask = passes[10 + 5]  # the second batch at noise level 0.5
    experts = mask[:, 0].sum(-1).float().mean(0).view(4, 4)
    np.testing.assert_allclose(heat.experts_IVRQ[2, 2], experts)
    shown = ((x[0, 0].clamp(-1, 1) + 1) * 127.5).round()
    np.testing.assert_array_equal(heat.states_IV[2][2, ..., 0], shown.byte())
    mean = torch.stack([mask[:, 0].sum(-1).float().mean(0) for _, _, mask in passes[10:20]]).mean(0)
    np.testing.assert_allclose(heat.mean_IRQ[2].flatten(), mean, rtol=1e-5)


def test_a_token_is_drawn_where_its_patch_is():
    config = report_config("batch_pool")
    model = random_model(config)
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4:8, 8:12] = 1  # second row, third column of patches
    with torch.no_grad():
        tokens = model.x_embedder(image) - model.x_embedder(torch.zeros_like(image))
    (token,) = tokens.abs().sum(-1)[0].nonzero().flatten().tolist()
    mask = torch.zeros(16, 4, dtype=torch.bool)
    mask[token] = True
    recorder = Recorder(model, heat_maps=1)
    output = DiTOutput(image, (Routing(mask, None, mask.float(), {}, None, None, None),) * 2)
    recorder.see_inputs(model, (image,))
    recorder.observe(torch.tensor([0.5]), torch.tensor([0]), output)
    record = recorder.take()
    heat = record.experts_IVS.reshape(len(LEVELS), 4, 4)
    assert (heat[:, 1, 2] == 4).all() and heat.sum() == 4 * len(LEVELS)


def test_a_dense_model_has_pictures_alone():
    found, _ = run_probe(random_model(report_config("dense")), 2.0)
    assert found.picture_NHWC.shape == (5, 16, 16, 1) and found.layers == ()
    assert found.capacity_NKL is None and found.heat_maps is None


def test_probing_leaves_the_model_as_it_was():
    model = random_model(report_config("batch_pool"))
    before = model.assumed_capacities, len(model._forward_hooks)
    run_probe(model, 1.0)
    assert (model.assumed_capacities, len(model._forward_hooks)) == before


def test_classes_are_sorted_by_capacity_with_intervals():
    labels, mean, error = class_capacity(np.array([7, 3, 7, 3, 5]), np.array([1.0, 2.0, 3.0, 4.0, 9.0]))
    assert labels.tolist() == [5, 3, 7] and mean.tolist() == [9.0, 3.0, 2.0]
    np.testing.assert_allclose(error, [0, 1.96, 1.96], rtol=1e-6)  # s / sqrt(n) = sqrt(2) / sqrt(2)


def test_history_of_a_run(tmp_path):
    found = read_history(write_run(tmp_path, report_config("batch_pool")))
    assert found.rows == 40 and found.last["images"] == 640 and found.seconds == pytest.approx(20)
    assert found.curves["lr"].value_P.tolist() == [1e-3] * 40 and "balance_loss" not in found.curves
    assert found.validation.loss.images_P.tolist() == [320, 640] and len(found.validation.by_noise_level) == 10
    assert found.validation.metrics["frechet"].value_P.tolist() == [5, 2.5]
    assert found.validation.extractor == "random" and set(found.validation.metrics) == {"frechet", "n", "n_reference"}
    assert found.validation.held_out.value_P.tolist() == [1234, 1234]
    assert {layer: len(curves) for layer, curves in found.thresholds.items()} == {"block_01": 4, "block_03": 4}
    assert found.thresholds["block_03"][2].value_P == pytest.approx([0.2, 0.2])


def test_history_of_nothing_and_of_nonsense(tmp_path):
    assert read_history(tmp_path / "missing").rows == 0
    lines = ["[1]", '{"images": "many"}', '{"images": NaN}', '{"images": 16, "loss": "low", "lr": true}', "\x00"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text('{"images": 5, "validation_loss_by_noise_level": 3, "metrics": 1}\n')
    (tmp_path / "tensorboard").mkdir()
    found = read_history(tmp_path)
    assert found.rows == 1 and found.curves == {} and found.thresholds == {}
    assert found.validation.by_noise_level == () and found.validation.metrics == {}


def test_long_curves_are_averaged(tmp_path):
    rows = [{"images": step, "loss": step % 2} for step in range(1, 6001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_history(tmp_path).curves["loss"]
    assert len(curve.value_P) == MAX_POINTS and (curve.value_P == 0.5).all()
    assert curve.images_P[0] == 10 and curve.images_P[-1] == 6000


@pytest.mark.usefixtures("hang_limit")
def test_hostile_log_files_cost_little(tmp_path):
    levels, metrics = [0.5] * 5000, dict.fromkeys(map(str, range(5000)), 1)
    row = {"images": 8, "validation_loss": 0.5, "validation_loss_by_noise_level": levels, "metrics": metrics}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "tensorboard").mkdir()
    events = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    for make in (os.mkfifo, os.mkdir):
        make(events)
        found = read_history(tmp_path)
        assert found.thresholds == {}
        assert len(found.validation.by_noise_level) == len(found.validation.metrics) == 100
        (events.rmdir if events.is_dir() else events.unlink)()
