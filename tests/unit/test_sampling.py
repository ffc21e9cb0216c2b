"""Samplers and guidance against the reference's numbers, exact solutions and the identities they promise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.diffusion.ddpm import GaussianDiffusion, dit_diffusion
from diffmoe_ds.diffusion.objective import SAMPLERS
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.dpm import log_snr_steps
from diffmoe_ds.sampling.guidance import guided
from diffmoe_ds.sampling.samplers import check_sampling, sample

GOLDEN = Path(__file__).parent.parent / "golden" / "ddpm_process.npz"
DIFFUSION = dit_diffusion()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over largest expected value."""
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


def golden_model(golden: dict[str, np.ndarray]):
    W = torch.from_numpy(golden["model/W"])

    def model_fn(x, t_B):
        return torch.einsum("oc,bchw->bohw", W, x).tanh() * (0.5 + 0.5 * t_B.float() / 1000)[:, None, None, None]

    return model_fn


def test_golden_sampling_loops(golden):
    z, model_fn = torch.from_numpy(golden["in/z"]), golden_model(golden)
    noises = iter(torch.from_numpy(golden["ancestral/noise"]))
    ancestral = sample(model_fn, "ddpm", z, 10, noise_fn=noises.__next__)
    assert relative_error(ancestral, golden["ancestral/out"]) < 1e-5
    assert len(list(noises)) == 1, "the last step adds no noise, so it must not use up a stream's numbers"
    assert relative_error(sample(model_fn, "ddim", z, 10), golden["ddim/out"]) < 1e-5
    assert torch.equal(sample(model_fn, "ddim", z, 10), sample(model_fn, "ddim", z, 10)), "DDIM is deterministic"


# ------------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
def test_flow_samplers_converge_at_their_order(kind, order):
    """dx/dt = (cos t - 1) x has the solution x(1) = x(0) exp(sin 1 - 1)."""
    z = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    exact = z * math.exp(math.sin(1) - 1)

    def model_fn(x, t_B):
        return (t_B.double().cos() - 1)[:, None, None, None] * x

    errors = [(sample(model_fn, kind, z, steps) - exact).abs().max().item() for steps in (20, 40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


def gaussian_model(std: float, process: GaussianDiffusion = DIFFUSION):
    """The best predictor for data N(0, std^2): E[noise | x_t], and the posterior's variance."""

    def model_fn(x, t_B):
        alpha_bar = torch.from_numpy(process.alphas_cumprod_N)[t_B].to(x.dtype)[:, None, None, None]
        noise = (1 - alpha_bar).sqrt() * x / (alpha_bar * std**2 + 1 - alpha_bar)
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)

    return model_fn


def test_ddim_follows_the_exact_flow_of_gaussian_data():
    std = 0.5
    z = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    last = DIFFUSION.alphas_cumprod_N[-1]
    exact = z * std / math.sqrt(last * std**2 + 1 - last)
    errors = [(sample(gaussian_model(std), "ddim", z, n) - exact).abs().max().item() for n in (100, 1000)]
    assert errors[1] < errors[0] / 5 and errors[1] < 0.01 * exact.abs().max()


def test_ancestral_sampling_reproduces_gaussian_data():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 80, 80, generator=generator)
    out = sample(gaussian_model(0.5), "ddpm", z, 100, lambda: torch.randn(z.shape, generator=generator))
    assert out.std().item() == pytest.approx(0.5, rel=0.05) and out.mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_mates(kind):
    z = torch.randn(3, 2, 4, 4)

    def model_fn(x, t_B):
        out = torch.sin(3 * x) * (0.5 + t_B.float() / 1000)[:, None, None, None]
        return out if SAMPLERS[kind] == "flow" else torch.cat([out, out.cos()], dim=1)

    def streams(images):
        generators = [torch.Generator().manual_seed(i) for i in images]
        return lambda: torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])

    together = sample(model_fn, kind, z, 8, streams([0, 1, 2]))
    alone = torch.cat([sample(model_fn, kind, z[i : i + 1], 8, streams([i])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_model_times_progress_and_precision(kind):
    calls, done = [], []

    def model_fn(x, t_B):
        assert x.dtype == torch.float32 and t_B.shape == (2,)
        calls.append(t_B[1].item())
        assert t_B.dtype == (torch.float32 if SAMPLERS[kind] == "flow" else torch.int64)
        return torch.zeros(2, 1 if SAMPLERS[kind] == "flow" else 2, 2, 2, dtype=torch.bfloat16)

    z = torch.randn(2, 1, 2, 2).bfloat16()
    out = sample(model_fn, kind, z, 4, lambda: torch.zeros_like(z), lambda *step: done.append(step))
    assert out.dtype == torch.float32 and out.shape == z.shape
    if kind == "dopri5":
        assert done == sorted(done) and done[-1] == (4, 4) and calls[0] == 0
        return
    assert done == [(i, 4) for i in (1, 2, 3, 4)]
    expected = {
        "euler": [0, 0.25, 0.5, 0.75],
        "heun": [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1],
        "sde": [0, 0.32, 0.64, 0.96],
        "dpm": log_snr_steps(4).tolist(),
    }
    assert calls == pytest.approx(expected.get(kind, [999, 666, 333, 0]))


def test_sampling_refuses_invalid_settings():
    for objective, sampler, steps in [
        ("flow", "ddpm", 10),
        ("ddpm", "euler", 10),
        ("flow", "dpm++", 10),
        ("flow", "euler", 0),
        ("flow", "heun", "10"),
        ("flow", "heun", True),
        ("ddpm", "ddpm", 1001),
        ("ddpm", "ddim", 0),
        ("ddpm", "ddim", "ddim50"),
    ]:
        with pytest.raises(ConfigError):
            check_sampling(objective, sampler, steps)
    check_sampling("flow", "euler", 5000)
    check_sampling("ddpm", "ddim", 1000)
    z = torch.zeros(1, 1, 2, 2)
    for kind in ("dpm++", "ddpm", "sde"):
        with pytest.raises(ConfigError):
            sample(lambda x, t_B: x, kind, z, 10)


# ------------------------------------------------------------------------------------------------------ guidance


def label_forward(channels: int, sizes: list[int]):
    """A forward whose output depends on image, time and label; ``sizes`` collects the batch sizes it was given."""

    def forward(x, t_B, y_B):
        sizes.append(len(x))
        out = x.mean(1, keepdim=True) * torch.arange(1, channels + 1)[:, None, None] + y_B[:, None, None, None]
        return out * (1 + t_B[:, None, None, None])

    return forward


def test_flow_guidance():
    x, t, y, null = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([3, 5]), torch.tensor([10, 10])
    sizes = []
    forward = label_forward(4, sizes)
    cond, uncond = forward(x, t, y), forward(x, t, null)
    sizes.clear()
    assert torch.equal(guided(forward, y, None, 1.0, "flow", 4)(x, t), cond) and sizes == [2]
    sizes.clear()
    assert torch.equal(guided(forward, y, null, 0.0, "flow", 4)(x, t), uncond) and sizes == [2, 2]
    torch.testing.assert_close(guided(forward, y, null, 1.5, "flow", 4)(x, t), uncond + 1.5 * (cond - uncond))
    sizes.clear()
    joined = guided(forward, y, null, 1.5, "flow", 4, one_batch=True)(x, t)
    assert torch.equal(joined, guided(forward, y, null, 1.5, "flow", 4)(x, t)) and sizes == [4, 2, 2]


@pytest.mark.parametrize(("guide_channels", "G"), [(None, 3), (3, 3), ("all", 4), (1, 1), (9, 4)])
def test_ddpm_guidance(guide_channels, G):
    x, t, y, null = torch.randn(2, 4, 4, 4), torch.tensor([1, 7]), torch.tensor([3, 5]), torch.tensor([10, 10])
    sizes = []
    forward = label_forward(8, sizes)
    cond, uncond = forward(x, t, y), forward(x, t, null)
    sizes.clear()
    assert torch.equal(guided(forward, y, None, 1.0, "ddpm", 4, guide_channels)(x, t), cond) and sizes == [2]
    sizes.clear()
    for scale in (0.0, 4.0):
        out = guided(forward, y, null, scale, "ddpm", 4, guide_channels)(x, t)
        torch.testing.assert_close(out[:, :G], (uncond + scale * (cond - uncond))[:, :G])
        assert torch.equal(out[:, G:], cond[:, G:]), "unguided noise channels and the variance are the conditional ones"
    assert sizes == [4, 4]


def test_ddpm_guidance_joins_structured_conditioning():
    seen = []

    def forward(x, t_B, cond):
        seen.append(cond)
        return torch.cat([x, x], dim=1)

    text = {"tokens": torch.zeros(2, 5, 3), "mask": (torch.ones(2, 5), torch.ones(2, 1))}
    null = {"tokens": torch.ones(2, 5, 3), "mask": (torch.zeros(2, 5), torch.zeros(2, 1))}
    guided(forward, text, null, 2.0, "ddpm", 4)(torch.zeros(2, 4, 2, 2), torch.zeros(2, dtype=torch.int64))
    assert seen[0]["tokens"].flatten(1)[:, 0].tolist() == [0, 0, 1, 1]
    assert seen[0]["mask"][1].flatten().tolist() == [1, 1, 0, 0]
