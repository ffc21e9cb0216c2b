"""Models as diffusers' own classes: the outputs are ours."""

from __future__ import annotations

import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.interop.stock import stock_problems, transformer_config, transformer_weights
from diffmoe_ds.model.dit import DiT


def test_the_outputs_of_diffusers_are_ours():
    from diffusers import DiTTransformer2DModel

    config = load_config(
        "imagenet-256", ["model.name=Dense-nano", "routing.kind=dense", "objective.kind=ddpm", "model.num_classes=7"]
    )
    assert not stock_problems(config)
    torch.manual_seed(0)
    ours = DiT(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.eval()
    settings = {key: value for key, value in transformer_config(config).items() if not key.startswith("_")}
    theirs = DiTTransformer2DModel(**settings).eval()
    missing, unexpected = theirs.load_state_dict(dict(transformer_weights(ours.state_dict())), strict=False)
    assert not unexpected and all("pos_embed.pos_embed" in name for name in missing)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 32, 32), torch.tensor([0, 400, 999]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        expected = ours(x, t, y).prediction
        found = theirs(x, timestep=t, class_labels=y).sample
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("objective.kind=flow", "objective.kind is flow"),
        ("model.mlp=swiglu", "model.mlp is swiglu"),
        ("model.mlp_ratio=2", "model.mlp_ratio is 2.0"),
        ("model.label_dropout=0", "model.label_dropout is 0"),
    ),
)
def test_what_diffusers_cannot_represent_is_named(override, message):
    dense = ["model.name=Dense-nano", "routing.kind=dense", "objective.kind=ddpm"]
    assert stock_problems(load_config("imagenet-256", [*dense, override])) == [message]
    assert stock_problems(load_config("imagenet-256", ["objective.kind=ddpm"])) == ["routing.kind is batch_pool"]
