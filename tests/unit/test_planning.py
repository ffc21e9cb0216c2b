"""What `diffmoe plan` computes: operations, memory, bytes and time of a layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.planning.devices import DEVICES, device_named, device_reported
from diffmoe_ds.planning.flops import flops_per_image


@pytest.mark.parametrize(
    "overrides",
    (
        ("model.name=Dense-S", "routing.kind=dense", "model.depth=2"),
        ("model.name=tiny-E4", "model.mlp=swiglu", "routing.shared_experts=1", "objective.kind=ddpm"),
        ("model.name=tiny-E8", "routing.kind=token_choice", "routing.capacity=2"),
        ("model.name=tiny-E8", "routing.kind=expert_choice", "routing.interleave=false"),
    ),
)
def test_flops_equal_those_that_torch_counts(overrides):
    config = load_config("imagenet-256", overrides)
    model = DiT(config).train()
    init_weights(model, seed=0)
    images = torch.randn(1, 4, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is not counted
        out = model(images, torch.rand(1), torch.zeros(1, dtype=torch.int64))
        assert counter.get_total_flops() == flops_per_image(config).forward
        logits = [r.capacity_logits_TE.sum() for r in out.routing if r.capacity_logits_TE is not None]
        (out.prediction.sum() + sum(logits)).backward()
    assert counter.get_total_flops() == flops_per_image(config).training


def test_dit_flops_agree_with_the_dit_paper():
    """GMACs of DiT at patch 2 in latents of 256-pixel images (arXiv 2212.09748, table 1); ours are twice as many."""
    for name, gmacs in (("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)):
        config = load_config("imagenet-256", [f"model.name=Dense-{name}", "routing.kind=dense", "objective.kind=ddpm"])
        assert flops_per_image(config).forward / 2e9 == pytest.approx(gmacs, rel=0.002)


def test_gpus_are_found_by_our_name_and_by_the_driver_s():
    assert device_named("h200") is DEVICES["H200"]
    for reported, name in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ):
        assert device_reported(reported) is DEVICES[name]
    assert device_reported("Tesla V100") is None
    with pytest.raises(ConfigError, match="did you mean 'H100'"):
        device_named("H10")
