"""The diffusion processes against the reference's numbers, closed forms and the identities they promise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.diffusion.ddpm import dit_diffusion
from diffmoe_ds.diffusion.flow import flow_interpolate, flow_loss
from diffmoe_ds.diffusion.likelihood import discretized_log_likelihood, normal_kl
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.errors import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "ddpm_process.npz"
DIFFUSION = dit_diffusion()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over largest expected value."""
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


# ------------------------------------------------------------------------------------------- reference's numbers


def test_golden_tables(golden):
    np.testing.assert_allclose(DIFFUSION.betas_N, golden["betas"], rtol=1e-12)
    np.testing.assert_allclose(DIFFUSION.alphas_cumprod_N, golden["alphas_cumprod"], rtol=1e-12)
    respaced = DIFFUSION.respaced(int(str(golden["respaced/spec"])))
    np.testing.assert_array_equal(respaced.timesteps_N, golden["respaced/timesteps"])
    np.testing.assert_allclose(respaced.betas_N, golden["respaced/betas"], rtol=1e-12)


def test_golden_q_sample_and_p(golden):
    x, noise, t = tensor(golden["in/x0"]), tensor(golden["in/noise"]), tensor(golden["in/t"])
    xt = DIFFUSION.q_sample(x, t, noise)
    assert relative_error(xt, golden["q_sample"]) < 1e-6
    p = DIFFUSION.p_mean_variance(tensor(golden["in/model_out"]), xt, t)
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        assert relative_error(getattr(p, name), golden[f"p/{name}"]) < 1e-6, name


def test_golden_losses(golden):
    x, noise, t = tensor(golden["in/x0"]), tensor(golden["in/noise"]), tensor(golden["in/t"])
    losses = DIFFUSION.training_losses(tensor(golden["in/model_out"]), x, noise, t)
    # Element by element: the five images are five noise levels, with t = 0 and t = 999 among them.
    np.testing.assert_allclose(losses.mse_B.numpy(), golden["loss/mse"], rtol=1e-5)
    np.testing.assert_allclose(losses.vb_B.numpy(), golden["loss/vb"], rtol=1e-5)
    np.testing.assert_allclose(losses.loss_B.mean().numpy(), golden["loss/loss"], rtol=1e-6)


# ------------------------------------------------------------------------------------------------- training loss


def test_flow_path_and_loss():
    x, noise = torch.randn(2, 3, 2, 4, 4)
    assert torch.equal(flow_interpolate(x, noise, torch.zeros(3)), noise)
    assert torch.equal(flow_interpolate(x, noise, torch.ones(3)), x)
    step = flow_interpolate(x, noise, torch.full((3,), 0.75)) - flow_interpolate(x, noise, torch.full((3,), 0.25))
    torch.testing.assert_close(2 * step, x - noise)
    error_B = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(flow_loss(x - noise + error_B[:, None, None, None], x, noise), error_B**2)


def test_variational_term_is_zero_for_the_true_posterior():
    """The true noise with the posterior's variance makes p equal to q, at every step that is a KL."""
    x, noise = torch.randn(2, 8, 2, 4, 4, dtype=torch.float64)
    t = torch.randint(1, 1000, (8,))
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    losses = DIFFUSION.training_losses(output, x, noise, t)
    torch.testing.assert_close(losses.vb_B, torch.zeros_like(losses.vb_B), atol=1e-9, rtol=0)
    torch.testing.assert_close(losses.mse_B, torch.zeros_like(losses.mse_B))


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.0, 2.0))
@settings(max_examples=25, deadline=None)
def test_variational_term_is_not_negative(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 4, 2, 4, 4, generator=generator)
    output = scale * torch.randn(4, 4, 4, 4, generator=generator)
    t = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 1000, (3,), generator=generator)])
    assert DIFFUSION.training_losses(output, x, noise, t).vb_B.min() > -1e-6


def test_variational_term_trains_the_variance_alone():
    x, noise = torch.randn(2, 4, 2, 4, 4)
    output = torch.randn(4, 4, 4, 4, requires_grad=True)
    losses = DIFFUSION.training_losses(output, x, noise, torch.tensor([0, 1, 500, 999]))
    (vb_grad,) = torch.autograd.grad(losses.vb_B.sum(), output, retain_graph=True)
    (mse_grad,) = torch.autograd.grad(losses.mse_B.sum(), output)
    assert not vb_grad[:, :2].any() and vb_grad[:, 2:].abs().amax((1, 2, 3)).min() > 0
    assert mse_grad[:, :2].all() and not mse_grad[:, 2:].any()


def test_kl_and_likelihood_against_closed_forms():
    q, p = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-0.2, 1.9)
    kl = normal_kl(q.mean, 2 * q.stddev.log(), p.mean, 2 * p.stddev.log())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, p))
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for std in (0.01, 0.5, 3.0):
        log_variance = torch.full_like(pixels, 2 * math.log(std))
        log_p = discretized_log_likelihood(pixels, torch.full_like(pixels, 0.2), log_variance)
        assert log_p.exp().sum().item() == pytest.approx(1.0), "the 256 bins cover the line exactly once"


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_losses_are_float32_and_per_image(kind):
    objective = make_objective(kind)
    x, noise = torch.randn(2, 5, 4, 4, 4).bfloat16()
    t = objective.model_time(torch.rand(5))
    assert objective.corrupt(x, noise, t).dtype == torch.float32
    prediction = torch.randn(5, objective.out_channels(4), 4, 4).bfloat16()
    losses = objective.loss(prediction, x, noise, t)
    for name, values_B in losses.items():
        assert values_B.dtype == torch.float32 and values_B.shape == (5,)
        one = objective.loss(prediction[3:4], x[3:4], noise[3:4], t[3:4])[name]
        torch.testing.assert_close(one, values_B[3:4])


def test_tables_first_used_in_inference_mode_work_in_training():
    process = dit_diffusion()
    x, noise, t = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4), torch.tensor([0, 400])
    output = torch.randn(2, 4, 4, 4, requires_grad=True)
    with torch.inference_mode():
        process.training_losses(output, x, noise, t)
    process.training_losses(output, x, noise, t).loss_B.sum().backward()
    assert output.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------- respacing


@given(count=st.integers(1, 1000))
@settings(max_examples=50, deadline=None)
def test_even_respacing(count):
    process = DIFFUSION.respaced(count)
    kept = process.timesteps_N
    assert len(kept) == process.num_steps == count
    assert kept[-1] == 999 and (count == 1 or kept[0] == 0)
    gaps = np.diff(kept)
    assert count == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    np.testing.assert_allclose(process.alphas_cumprod_N, DIFFUSION.alphas_cumprod_N[kept], rtol=1e-10)
    assert (process.betas_N > 0).all() and (process.betas_N < 1).all()
    assert np.isfinite(process.posterior_log_variance_N).all()
    # (count 1 has no posterior between steps; its bounds coincide.)
    assert (process.posterior_log_variance_N[1:] <= process.log_betas_N[1:]).all()


@pytest.mark.parametrize("steps", [0, -1, 1001, "", "10", "ddim10", 2.5, True, None])
def test_respacing_refuses_invalid_counts(steps):
    with pytest.raises(ConfigError, match="steps must be an integer from 1 to 1000, got"):
        DIFFUSION.respaced(steps)


def test_respacing_all_steps_changes_nothing():
    process = DIFFUSION.respaced(1000)
    np.testing.assert_array_equal(process.timesteps_N, DIFFUSION.timesteps_N)
    np.testing.assert_allclose(process.betas_N, DIFFUSION.betas_N, rtol=1e-9)


# ----------------------------------------------------------------------------------------------------- objective


def test_objectives():
    flow, ddpm = make_objective("flow"), make_objective("ddpm")
    assert (flow.kind, flow.samplers, flow.out_channels(4)) == ("flow", ("euler", "heun", "dopri5", "sde"), 4)
    assert (ddpm.kind, ddpm.samplers, ddpm.out_channels(4)) == ("ddpm", ("ddpm", "ddim", "dpm"), 8)
    time = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    assert torch.equal(flow.model_time(time), time)
    assert ddpm.model_time(time).tolist() == [0, 250, 500, 999]
    assert ddpm.model_time(time.double() + 1e-9).dtype == torch.int64
    assert flow.noise_level(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]
    torch.testing.assert_close(ddpm.noise_level(torch.tensor([0, 250, 999])), torch.tensor([0.0, 0.25, 0.999]))
    with pytest.raises(ConfigError, match=r"objective\.kind must be flow or ddpm, got 'score'"):
        make_objective("score")


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_noise_level_orders_images_by_noise(kind):
    objective = make_objective(kind)
    x, noise = torch.ones(50, 1, 4, 4), torch.zeros(50, 1, 4, 4)
    t = objective.model_time(torch.rand(50))
    signal = objective.corrupt(x, noise, t)[:, 0, 0, 0]
    by_noise = signal[objective.noise_level(t).argsort()]
    assert (by_noise.diff() <= 0).all()
