"""The weights of min-SNR (`objective.min_snr_gamma`)."""

from __future__ import annotations

import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.diffusion.ddpm import dit_diffusion
from diffmoe_ds.diffusion.objective import make_objective


@pytest.mark.parametrize("gamma", (1.0, 5.0, 20.0))
def test_weights(gamma):
    """1 where the image is noisy, gamma / SNR where it is not, without a jump between them."""
    diffusion = dit_diffusion()
    t = torch.arange(1000)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    ratio = signal / (1 - signal)
    expected = ratio.clamp(max=gamma) / ratio
    found = diffusion.min_snr_weight(t, gamma)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert found[0] < 1e-3 * gamma and found[-1] == 1 and (found[1:] >= found[:-1]).all()


def test_only_the_squared_error_of_training_is_weighted():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = torch.randn(4, 6, 8, 8, generator=generator)
    t = torch.tensor([3, 40, 400, 999])
    plain, weighted = (make_objective("ddpm", gamma).loss(prediction, x, noise, t) for gamma in (None, 5.0))
    for key in ("mse_B", "vb_B"):
        assert torch.equal(plain[key], weighted[key])
    weight = dit_diffusion().min_snr_weight(t, 5.0)
    torch.testing.assert_close(weighted["loss_B"], weight * plain["mse_B"] + plain["vb_B"])
    torch.testing.assert_close(plain["loss_B"], plain["mse_B"] + plain["vb_B"])


def test_it_has_no_effect_on_flow():
    assert load_config("fashion", ["objective.min_snr_gamma=5"]).objective.unused == ("min_snr_gamma",)
    ddpm = load_config("fashion", ["objective.kind=ddpm", "objective.min_snr_gamma=5", "objective.flow_time_scale=1"])
    assert "min_snr_gamma" not in ddpm.objective.unused
