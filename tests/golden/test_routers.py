"""ProMoE and DSMoE give their references' numbers: outputs, selections, weights, losses, gradients, samples.

With 8 output channels, the last 4 were never trained nor used, and an import leaves them out.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffmoe_ds import load_official
from diffmoe_ds.checkpoint.reference import reference_views
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.null_images import find_null_images
from diffmoe_ds.sampling.guidance import guided
from diffmoe_ds.sampling.samplers import sample
from tests.golden.test_golden import TOLERANCE, assert_close, golden, inputs, model_of

MODELS = ("promoe_flow", "promoe_variant_flow", "promoe_ec_flow", "dsmoe_flow", "dsmoe_variant_flow")


class Golden:
    """A reference's file: its inputs and outputs in our convention of time, from noise to data."""

    def __init__(self, name: str) -> None:
        self.file = golden(name)
        self.config = json.loads(str(self.file["config"]))
        is_reversed = self.config["timesteps"] == "sigma1000"
        self.x, t_B, self.y = inputs(self.file)
        self.t_B = 1 - t_B.double() / 1000 if is_reversed else t_B
        self.sign = -1 if is_reversed else 1

    def velocity(self, key: str) -> np.ndarray:
        return self.sign * self.file[key][:, : self.x.shape[1]]

    def gradient(self, name: str, like: torch.Tensor) -> np.ndarray:
        """The gradient of a weight; of the last layer, that for the channels that are used."""
        gradient = self.file[f"grad/{name}"]
        if gradient.shape != like.shape:
            pixels = self.config["model"]["patch_size"] ** 2
            used = gradient.reshape(pixels, -1, *gradient.shape[1:])[:, : self.x.shape[1]]
            assert not gradient.reshape(pixels, -1, *gradient.shape[1:])[:, self.x.shape[1] :].any()
            gradient = used.reshape(like.shape)
        return gradient


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_samples(name):
    case = Golden(name)
    model = model_of(case.file).eval()
    with torch.no_grad():
        assert_close(model(case.x, case.t_B, case.y).prediction, case.velocity("eval/out"), "eval/out")
        assert_close(model(case.x, case.t_B.float(), case.y).prediction, case.velocity("eval/out"), "times in fp32")
    for key in (key for key in case.file if key.startswith("sample/") and "cfg" in key):
        sampler, scale = key.removeprefix("sample/").split("8_cfg")
        model_fn = guided(
            lambda x, t, y: model(x, t, y).prediction, case.y, model.y_embedder.null_like(case.y), float(scale), "flow",
            case.x.shape[1],
        )  # fmt: skip
        with torch.no_grad():
            assert_close(sample(model_fn, sampler, case.x, 8), case.file[key], key)


@pytest.mark.parametrize("name", MODELS)
def test_train_step(name):
    case = Golden(name)
    model = model_of(case.file).train()
    output = model(case.x, case.t_B, case.y)
    assert_close(output.prediction, case.velocity("train/out"), "train/out")
    target = torch.from_numpy(case.velocity("train/target"))
    loss = (output.prediction - target).square().mean()
    assert_close(loss, case.file["train/mse"], "train/mse")

    shape = (len(case.x), model.config.tokens_per_image, model.config.num_experts)
    for block, record in zip(model.moe_layers(), output.routing, strict=True):
        selected, weights = (case.file[f"train/{kind}/{block}"][:, :, : shape[2]] for kind in ("selected", "weights"))
        np.testing.assert_array_equal(record.mask_TE.view(shape).numpy(), selected.astype(bool))
        assert_close((record.weights_TE * record.mask_TE).view(shape), weights, f"weights {block}")
        if "contrastive" in record.auxiliary:
            assert_close(record.auxiliary["contrastive"], case.file[f"train/contrastive_loss/{block}"], f"loss {block}")
            loss = loss + model.config.routing.contrastive_weight * record.auxiliary["contrastive"]
    assert any(key.startswith("train/contrastive") for key in case.file) == ("contrastive" in record.auxiliary)
    assert_close(loss, case.file["train/loss"], "train/loss")

    loss.backward()
    compared = set()
    for ours, parameter in model.named_parameters():
        for theirs, gradient in reference_views(model.config, ours, parameter.grad).items():
            compared.add(f"grad/{theirs}")
            if theirs not in case.config.get("noise_gradients", ()):
                assert_close(gradient, case.gradient(theirs, gradient), f"grad/{theirs}")
    assert compared == {key for key in case.file if key.startswith("grad/")}


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_alone(name):
    """What the experts return for the reference's own tokens, so that errors of other layers cannot hide."""
    case = Golden(name)
    model = model_of(case.file).eval()
    layers, null = model.moe_layers(), None
    if model.config.routing.unconditional_expert:
        null = find_null_images(model.y_embedder.is_null(case.y))
    for block, layer in layers.items():
        with torch.no_grad():
            out, _ = layer(torch.from_numpy(case.file[f"train/moe_in/{block}"]), None, null)
        assert_close(out, case.file[f"train/moe_out/{block}"], f"layer {block}")


def changed(name: str, **arguments: object) -> tuple[dict, dict[str, torch.Tensor]]:
    """A reference's configuration with other arguments, and its weights."""
    file = golden(name)
    config = json.loads(str(file["config"]))
    for key, value in arguments.items():
        section, _, key = key.partition("__")
        config[section][key] = value
    return config, {key[6:]: torch.from_numpy(value) for key, value in file.items() if key.startswith("state/")}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    (
        ("promoe_flow", {"model__num_classes": 10}, "model.num_classes: only 1000 is supported for promoe, got 10"),
        ("promoe_flow", {"moe__use_uncond_expert": False}, "moe.use_uncond_expert: only True is supported"),
        ("promoe_ec_flow", {"moe__router_weight_mode": "softmax"}, "over the tokens of an image, is not supported"),
        (
            "promoe_variant_flow", {"moe__use_top_k_for_routing_contrastive": False},
            "false is not supported for top_k above 1",
        ),
        ("dsmoe_flow", {"moe__skip_first2": "yes"}, "moe.skip_first2: must be true, false or a .*, got 'yes'"),
        ("dsmoe_flow", {"moe__skip_first2": 1.5}, "moe.skip_first2: must be true, false or a .*, got 1.5"),
        ("dsmoe_flow", {"moe__moe_intermediate_size": None}, "moe.moe_intermediate_size: missing"),
        ("dsmoe_flow", {"model__rope_type": "1d"}, "model.rope_type: only 2d is supported for dsmoe, got '1d'"),
        ("dsmoe_flow", {"moe__use_shared_expert": None}, "moe.use_shared_expert: only True is supported"),
    ),
)  # fmt: skip
def test_unsupported_arguments_are_named(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_official(*changed(name, **arguments))


def test_weights_of_another_model_class_are_named():
    config, state = changed("promoe_flow")
    with pytest.raises(CheckpointError, match=r"are those of the model class 'promoe' \(prototypes"):
        load_official({**config, "kind": "dsmoe"}, state)
    del config["moe"]["top_k"]
    with pytest.raises(ConfigError, match=r"moe\.top_k: missing in the configuration of a promoe model"):
        load_official(config, state)
    config, state = changed("dsmoe_flow")
    del state["blocks.1.mlp.gate.e_score_correction_bias"]
    with pytest.raises(CheckpointError, match=r"lack 'blocks\.1\.mlp\.gate\.e_score_correction_bias'"):
        load_official(config, state)


def test_dense_blocks_before_the_experts():
    """`skip_first2: true` stands for two, as in the reference; a model of four blocks keeps its last MoE layer."""
    config, state = changed("dsmoe_flow", moe__skip_first2=True)
    assert load_official({**config}, _without_experts(state, 1)).config.moe_blocks == (3,)


def _without_experts(state: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    """Replace a MoE layer by a dense FFN with two matrices and biases."""
    prefix = f"blocks.{block}.mlp."
    kept = {name: value for name, value in state.items() if not name.startswith(prefix)}
    dense = {
        name.replace("blocks.0.", f"blocks.{block}."): value for name, value in state.items() if "blocks.0.mlp" in name
    }
    return {**kept, **dense}


def test_the_prototypes_of_a_model_decide_by_direction_only():
    """ProMoE's cosines: longer prototypes and tokens change neither scores nor selections."""
    case = Golden("promoe_flow")
    model = model_of(case.file).eval()
    assert isinstance(model, DiT)
    with torch.no_grad():
        before = model(case.x, case.t_B, case.y).prediction
        for layer in model.moe_layers().values():
            layer.gate_weight.mul_(7)
        after = model(case.x, case.t_B, case.y).prediction
    assert (before - after).abs().max() < TOLERANCE
