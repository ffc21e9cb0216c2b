"""The published models give the reference's numbers: outputs, selections, losses, thresholds, gradients, samples."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds import load_official
from diffmoe_ds.checkpoint.reference import reference_views
from diffmoe_ds.errors import CheckpointError, DiffMoEError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.capacity import capacity_loss
from diffmoe_ds.moe.thresholds import Thresholds
from diffmoe_ds.sampling.guidance import guided
from diffmoe_ds.sampling.samplers import sample

MODELS = ("dense_flow", "tc_flow", "ec_flow", "diffmoe_flow", "diffmoe_ddpm")
FLOW = tuple(name for name in MODELS if name.endswith("flow"))
RELEASED = ("reference_yaml_flow", "reference_ec_c2", "reference_tc_c2")
"""16 heads and a variance that flow ignores, as in the reference's released configuration; capacity 2."""
TOLERANCE = 1e-5


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def model_of(file: dict[str, np.ndarray]) -> DiT:
    state = {key[len("state/") :]: torch.from_numpy(value) for key, value in file.items() if key.startswith("state/")}
    return load_official(json.loads(str(file["config"])), state)


def inputs(file: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(file[f"in/{key}"]) for key in "xty")


def assert_close(ours: torch.Tensor, theirs: np.ndarray, what: str) -> None:
    """Largest difference over largest value, which is what 'max relative error' means for a tensor."""
    expected = torch.as_tensor(theirs, dtype=torch.float64)
    error = (ours.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", (*MODELS, *RELEASED))
def test_eval_output(name):
    file = golden(name)
    model = model_of(file).eval()
    with torch.no_grad():
        assert_close(model(*inputs(file)).prediction, file["eval/out"], "eval/out")


@pytest.mark.parametrize("name", MODELS)
def test_train_step(name):
    """Output, selection, capacity loss, total loss, every gradient, thresholds."""
    file = golden(name)
    model = model_of(file).train()
    output = model(*inputs(file))
    assert_close(output.prediction, file["train/out"], "train/out")
    mse = (output.prediction - torch.from_numpy(file["train/target"])).square().mean()
    assert_close(mse, file["train/mse"], "train/mse")

    loss, routing = mse, model.config.routing
    images, tokens = len(file["in/x"]), model.config.tokens_per_image
    for block, record in zip(model.moe_layers(), output.routing, strict=True):
        if record.capacity_logits_TE is not None:
            selected = record.mask_TE.view(images, tokens, -1).numpy()
            np.testing.assert_array_equal(selected, file[f"train/selected/{block}"].astype(bool))
            logits = record.capacity_logits_TE.view(images, tokens, -1)
            assert_close(logits, file[f"train/capacity_logits/{block}"], f"capacity logits {block}")
            layer_loss = capacity_loss(record.capacity_logits_TE, record.mask_TE)
            assert_close(layer_loss, file[f"train/cp_loss/{block}"], f"capacity loss {block}")
            loss = loss + routing.capacity_weight * layer_loss
    assert_close(loss, file["train/loss"], "train/loss")
    for record in output.routing:  # the reference adds this one to the gradients only
        if "balance" in record.auxiliary:
            loss = loss + routing.balance_weight * record.auxiliary["balance"]

    loss.backward()
    compared = set()
    for ours, parameter in model.named_parameters():
        for theirs, gradient in reference_views(model.config, ours, parameter.grad).items():
            assert_close(gradient, file[f"grad/{theirs}"], f"grad/{theirs}")
            compared.add(f"grad/{theirs}")
    assert compared == {key for key in file if key.startswith("grad/")}

    thresholds = Thresholds(model.moe_layers().values(), model.config.routing, world=1)
    thresholds.observe(output.routing)
    assert thresholds.search() is None
    thresholds.update(is_inconclusive=False)
    for block, layer in model.moe_layers().items():
        key = f"train/threshold_after/blocks.{block}.mlp.expert_threshold"
        if key in file:
            assert_close(layer.expert_threshold, file[key], key)


@pytest.mark.parametrize(
    ("name", "sampler"), [*product(FLOW, ("euler", "heun")), *((name, "euler") for name in RELEASED)]
)
@pytest.mark.parametrize("scale", (1.0, 1.5))
def test_samples(name, sampler, scale):
    file = golden(name)
    model = model_of(file).eval()
    x, _, y = inputs(file)
    model_fn = guided(
        lambda x, t, y: model(x, t, y).prediction, y, model.y_embedder.null_like(y), scale, "flow", x.shape[1]
    )
    with torch.no_grad():
        out = sample(model_fn, sampler, x, 8)
    assert_close(out, file[f"sample/{sampler}8_cfg{scale:g}"], f"{sampler} cfg {scale}")


@pytest.mark.parametrize(
    ("config", "state", "message"),
    (
        ({}, {}, "must be a dict with kind, model and moe"),
        ("config.yaml", {}, "must be a dict with kind, model and moe"),
        ({"kind": "dense", "model": {"hidden_size": "a"}}, {}, "model.hidden_size must be a positive integer, got 'a'"),
        ({"kind": "dense", "model": {}}, {"ema": {}}, "'ema' is a dict, but a state_dict holds tensors by name"),
    ),
)
def test_arguments_of_another_form_are_named(config, state, message):
    with pytest.raises(DiffMoEError, match=message):
        load_official(config, state)


def test_missing_and_unexpected_weights_are_named():
    file = golden("diffmoe_flow")
    config = json.loads(str(file["config"]))
    state = {key[len("state/") :]: torch.from_numpy(value) for key, value in file.items() if key.startswith("state/")}
    missing = {key: value for key, value in state.items() if key != "blocks.1.mlp.experts.2.fc1.weight"}
    with pytest.raises(CheckpointError, match=r"lack 'blocks\.1\.mlp\.experts\.2\.fc1\.weight'"):
        load_official(config, missing)
    with pytest.raises(CheckpointError, match="hold 'surplus'"):
        load_official(config, {**state, "surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'final_layer\.linear\.bias' has shape \(3,\)"):
        load_official(config, {**state, "final_layer.linear.bias": torch.zeros(3)})
