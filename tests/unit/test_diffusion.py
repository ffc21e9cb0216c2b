"""The diffusion processes against the reference's numbers, closed forms and the identities they promise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.diffusion.ddpm import (
    GaussianDiffusion,
    discretized_log_likelihood,
    dit_diffusion,
    normal_kl,
    spaced_steps,
)
from diffmoe_ds.diffusion.flow import flow_interpolate, flow_loss
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.samplers import SAMPLERS, check_sampling, guided, sample

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


def golden_model(golden: dict[str, np.ndarray]):
    W = tensor(golden["model/W"])

    def model_fn(x, t_B):
        return torch.einsum("oc,bchw->bohw", W, x).tanh() * (0.5 + 0.5 * t_B.float() / 1000)[:, None, None, None]

    return model_fn


# ------------------------------------------------------------------------------------------- reference's numbers


def test_golden_tables(golden):
    np.testing.assert_allclose(DIFFUSION.betas_N, golden["betas"], rtol=1e-12)
    np.testing.assert_allclose(DIFFUSION.alphas_cumprod_N, golden["alphas_cumprod"], rtol=1e-12)
    respaced = DIFFUSION.respaced(str(golden["respaced/spec"]))
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


def test_golden_sampling_loops(golden):
    z, model_fn = tensor(golden["in/z"]), golden_model(golden)
    noises = iter(tensor(golden["ancestral/noise"]))
    ancestral = sample(model_fn, "ddpm", z, 10, noise_fn=noises.__next__)
    assert relative_error(ancestral, golden["ancestral/out"]) < 1e-5
    assert len(list(noises)) == 1, "the last step adds no noise, so it must not use up a stream's numbers"
    assert relative_error(sample(model_fn, "ddim", z, 10), golden["ddim/out"]) < 1e-5
    assert torch.equal(sample(model_fn, "ddim", z, 10), sample(model_fn, "ddim", z, "10")), "eta 0 is deterministic"


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
        assert log_p.exp().sum().item() == pytest.approx(1.0), "the 256 bins cover the line once"


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


def test_tables_first_used_while_sampling_can_be_trained_with():
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


@given(count=st.integers(1, 1000))
@settings(max_examples=50, deadline=None)
def test_ddim_respacing(count):
    strides = [s for s in range(1, 1001) if len(range(0, 1000, s)) == count]
    if not strides:
        with pytest.raises(ConfigError, match="no whole stride"):
            spaced_steps(1000, f"ddim{count}")
        return
    np.testing.assert_array_equal(spaced_steps(1000, f"ddim{count}"), np.arange(0, 1000, strides[0]))


@pytest.mark.parametrize("steps", [0, -1, 1001, "", "ddim", "ddim0", "10,20", "1e2", 2.5, True, None])
def test_respacing_refuses(steps):
    with pytest.raises(ConfigError, match="steps is"):
        DIFFUSION.respaced(steps)


def test_respacing_all_steps_changes_nothing():
    process = DIFFUSION.respaced(1000)
    np.testing.assert_array_equal(process.timesteps_N, DIFFUSION.timesteps_N)
    np.testing.assert_allclose(process.betas_N, DIFFUSION.betas_N, rtol=1e-9)


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


@pytest.mark.parametrize(("kind", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_reproduce_gaussian_data(kind, eta):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 80, 80, generator=generator)
    out = sample(gaussian_model(0.5), kind, z, 100, lambda: torch.randn(z.shape, generator=generator), eta=eta)
    assert out.std().item() == pytest.approx(0.5, rel=0.05) and out.mean().item() == pytest.approx(0.0, abs=0.02)


def test_ddim_with_eta_one_is_ancestral_sampling_with_the_posterior_variance():
    """DDIM (arXiv 2010.02502), section 4.1."""
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    noises = torch.randn(9, 2, 1, 4, 4, dtype=torch.float64)
    ancestral = sample(gaussian_model(0.5), "ddpm", z, 10, iter(noises).__next__)
    ddim = sample(gaussian_model(0.5), "ddim", z, 10, iter(noises).__next__, eta=1.0)
    torch.testing.assert_close(ancestral, ddim)


def test_clip_denoised_limits_the_last_step():
    z = 5 * torch.randn(2, 1, 4, 4)
    model_fn = gaussian_model(3.0)
    assert sample(model_fn, "ddim", z, 10).abs().max() > 1.5
    assert sample(model_fn, "ddim", z, 10, clip_denoised=True).abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_mates(kind):
    z = torch.randn(3, 2, 4, 4)

    def model_fn(x, t_B):
        out = torch.sin(3 * x) * (0.5 + t_B.float() / 1000)[:, None, None, None]
        return out if SAMPLERS[kind] == "flow" else torch.cat([out, out.cos()], dim=1)

    def streams(images):
        generators = [torch.Generator().manual_seed(i) for i in images]
        return lambda: torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])

    together = sample(model_fn, kind, z, 8, streams([0, 1, 2]), eta=0.5)
    alone = torch.cat([sample(model_fn, kind, z[i : i + 1], 8, streams([i]), eta=0.5) for i in range(3)])
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
    assert done == [(i, 4) for i in (1, 2, 3, 4)]
    expected = {"euler": [0, 0.25, 0.5, 0.75], "heun": [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]}
    assert calls == expected.get(kind, [999, 666, 333, 0])


def test_sampling_refuses():
    for objective, sampler, steps in [
        ("flow", "ddpm", 10),
        ("ddpm", "euler", 10),
        ("flow", "dpm++", 10),
        ("flow", "euler", 0),
        ("flow", "heun", "10"),
        ("flow", "heun", True),
        ("ddpm", "ddpm", 1001),
        ("ddpm", "ddim", 0),
    ]:
        with pytest.raises(ConfigError):
            check_sampling(objective, sampler, steps)
    check_sampling("flow", "euler", 5000)
    check_sampling("ddpm", "ddim", "ddim50")
    z = torch.zeros(1, 1, 2, 2)
    for kind, steps, options in [
        ("dpm++", 10, {}),
        ("ddpm", 10, {}),
        ("ddim", 10, {"eta": 0.5}),
        ("ddim", 10, {"eta": 2, "noise_fn": z.clone}),
    ]:
        with pytest.raises(ConfigError):
            sample(lambda x, t_B: x, kind, z, steps, **options)


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


@pytest.mark.parametrize(("guide_channels", "G"), [(3, 3), ("all", 4), (1, 1), (9, 4)])
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
        assert torch.equal(out[:, G:], cond[:, G:]), "other noise channels and the variance are the conditional half's"
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


# ----------------------------------------------------------------------------------------------------- objective


def test_objectives():
    flow, ddpm = make_objective("flow"), make_objective("ddpm")
    assert (flow.kind, flow.samplers, flow.out_channels(4)) == ("flow", ("euler", "heun"), 4)
    assert (ddpm.kind, ddpm.samplers, ddpm.out_channels(4)) == ("ddpm", ("ddpm", "ddim"), 8)
    time = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    assert torch.equal(flow.model_time(time), time)
    assert ddpm.model_time(time).tolist() == [0, 250, 500, 999]
    assert ddpm.model_time(time.double() + 1e-9).dtype == torch.int64
    assert flow.noise_level(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]
    torch.testing.assert_close(ddpm.noise_level(torch.tensor([0, 250, 999])), torch.tensor([0.0, 0.25, 0.999]))
    with pytest.raises(ConfigError, match="valid is flow or ddpm"):
        make_objective("score")


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_noise_level_orders_how_noisy_images_are(kind):
    objective = make_objective(kind)
    x, noise = torch.ones(50, 1, 4, 4), torch.zeros(50, 1, 4, 4)
    t = objective.model_time(torch.rand(50))
    signal = objective.corrupt(x, noise, t)[:, 0, 0, 0]
    by_noise = signal[objective.noise_level(t).argsort()]
    assert (by_noise.diff() <= 0).all()
