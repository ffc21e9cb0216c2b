"""The adaptive Runge-Kutta method of Dormand and Prince, with a separate step size for every image.

`torchdiffeq.odeint` chooses one step size for the whole batch, so an image would depend on its batch. Here the
forward passes run on the whole batch, but each image has its own time, step size, and accepted and rejected steps:
exactly those of `torchdiffeq.odeint(..., method="dopri5")` for that image alone, with the same coefficients. Finished
images stay in the batch until all are done.

Legend: B images, C channels, H, W height and width, k stages of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffmoe_ds.diffusion.flow import per_image
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.fields import Run

Numbers = npt.NDArray[np.float64]
"""One number per image, [B]. Times and step sizes are on the host, in float64 as in torchdiffeq."""

SAFETY, LARGEST_FACTOR, SMALLEST_FACTOR = 0.9, 10.0, 0.2
"""Parameters of the step size control: torchdiffeq's defaults."""


@dataclass(frozen=True)
class Tolerances:
    """Tolerated error of a step: ``atol + rtol * |x|``, root mean square over an image. Defaults as in SiT."""

    rtol: float = 1e-3
    atol: float = 1e-6

    def check(self) -> None:
        """Check the values, which are options of ``diffmoe sample``.

        Raises:
            ConfigError: a tolerance is not a positive number.
        """
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be a positive number, got {value}.")


def integrate(run: Run, x_BCHW: Tensor, tolerances: Tolerances) -> Tensor:
    """Integrate the velocity from time 0 to time 1.

    As in torchdiffeq, the last step may go beyond time 1, and the result is interpolated: the model may be called with
    times slightly above 1. The host synchronizes with the device once per step, to decide which images accept it.

    Args:
        run: the velocity; ``run.progress`` is called after every step with the smallest time of all images, scaled to
            ``run.steps``.
        x_BCHW: initial noise, float32 or float64.
        tolerances: tolerances of the step size control.

    Returns:
        [B, C, H, W]; NaN for images whose velocity is not finite.
    """
    solver = _Solver(run, x_BCHW, tolerances)
    while solver.is_active_B.any():
        solver.step()
        run.progress(int(min(solver.time_B.min(), 1) * run.steps), run.steps)
    return solver.result


class _Solver:
    """The state of all images in a batch: x at each image's time, and the velocity there."""

    def __init__(self, run: Run, x: Tensor, tolerances: Tolerances) -> None:
        from torchdiffeq._impl.dopri5 import Dopri5Solver  # imported lazily: few runs need it

        method: Any = Dopri5Solver
        self._run, self._tolerances, self._order = run, tolerances, method.order
        self._alphas: list[float] = method.tableau.alpha.tolist()
        self._betas = [beta.to(x) for beta in method.tableau.beta]
        self._error_weights, self._middle_weights = method.tableau.c_error.to(x), method.mid.to(x)
        self._dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
        self.is_active_B = np.ones(len(x), bool)
        self.time_B: Numbers = np.zeros(len(x))
        self.result = torch.full_like(x, torch.nan)
        self._x, self._v = x, self._velocity(x, self.time_B)
        self._step_B = self._first_step()

    def step(self) -> None:
        """Attempt one step for every image; if the error is too large, reject it and reduce the step size."""
        step_B = np.where(self.is_active_B, self._step_B, 0.0)
        end_B = self.time_B + step_B
        size = self._per_image(step_B)
        stages, x_end = self._v.new_empty((*self._v.shape, 1 + len(self._alphas))), self._x
        stages[..., 0] = self._v
        for k, (alpha, beta) in enumerate(zip(self._alphas, self._betas, strict=True), start=1):
            x_end = self._x + _combine(beta, stages[..., :k], size)
            stages[..., k] = self._velocity(x_end, self._stage_time(alpha, step_B))
        ratio_B = self._error_ratio(_combine(self._error_weights, stages, size), x_end)
        accepted_B = self.is_active_B & (ratio_B <= 1)
        is_done_B = accepted_B & (end_B >= 1)
        if is_done_B.any():
            middle = self._x + _combine(self._middle_weights, stages, size)
            at_one = self._interpolate(
                (1 - self.time_B) / np.where(is_done_B, step_B, 1.0), size, stages, x_end, middle
            )
            self.result = self._where(is_done_B, at_one, self.result)
        self._x, self._v = self._where(accepted_B, x_end, self._x), self._where(accepted_B, stages[..., -1], self._v)
        self.time_B = np.where(accepted_B, end_B, self.time_B)
        self._step_B = step_B * self._factor(ratio_B)
        is_stuck_B = ~np.isfinite(self._step_B) | (self.time_B + self._step_B <= self.time_B)
        self.is_active_B = self.is_active_B & ~is_done_B & ~is_stuck_B

    def _stage_time(self, alpha: float, step_B: Numbers) -> Numbers:
        """Return the times of a stage, rounded as in torchdiffeq; the end of a step is approached from below."""
        if alpha == 1:
            end_B = (self.time_B + step_B).astype(self._dtype)
            return np.asarray(np.nextafter(end_B, end_B - 1), np.float64)
        time_B = self.time_B.astype(self._dtype) + self._dtype.type(alpha) * step_B.astype(self._dtype)
        return np.asarray(time_B, np.float64)

    def _velocity(self, x: Tensor, time_B: Numbers) -> Tensor:
        level_B = np.clip(1 - time_B, 0.0, 1.0)
        if not self.is_active_B.all():
            level_B = np.where(self.is_active_B, level_B, level_B[self.is_active_B][0])  # the others are not used
        return self._run.field(x, torch.from_numpy(time_B).to(x), level_B).to(x.dtype)

    def _first_step(self) -> Numbers:
        """Return the size of the first step (Hairer, Norsett and Wanner, Solving ODEs I, section II.4)."""
        scale = self._tolerances.atol + self._tolerances.rtol * self._x.abs()
        x_norm_B, v_norm_B = _norm(self._x / scale), _norm(self._v / scale)
        is_small_B = (x_norm_B < 1e-5) | (v_norm_B < 1e-5)
        trial_B = torch.where(is_small_B, 1e-6, 0.01 * x_norm_B / v_norm_B)
        x_trial = self._x + per_image(trial_B, self._x) * self._v
        v_trial = self._velocity(x_trial, _to_host(trial_B))
        change_B = _norm((v_trial - self._v) / scale) / trial_B
        largest_B = torch.maximum(v_norm_B, change_B)
        size_B = torch.where(
            largest_B <= 1e-15, (trial_B * 1e-3).clamp(min=1e-6), (0.01 / largest_B) ** (1 / self._order)
        )
        return _to_host(torch.minimum(100 * trial_B, size_B))

    def _error_ratio(self, error: Tensor, x_end: Tensor) -> Numbers:
        """Return the ratio of a step's error to the tolerated error."""
        largest = torch.maximum(self._x.abs(), x_end.abs())
        return _to_host(_norm(error / (self._tolerances.atol + self._tolerances.rtol * largest)))

    def _factor(self, ratio_B: Numbers) -> Numbers:
        """Return the factor of the step size; an accepted step never shrinks."""
        with np.errstate(divide="ignore"):
            wanted_B: Numbers = SAFETY * ratio_B ** (-1 / self._order)
        return np.clip(wanted_B, np.where(ratio_B < 1, 1.0, SMALLEST_FACTOR), LARGEST_FACTOR)

    def _interpolate(self, fraction_B: Numbers, size: Tensor, stages: Tensor, x_end: Tensor, middle: Tensor) -> Tensor:
        """Return x at a fraction of the step, by the polynomial of degree 4 through both ends and the middle."""
        x, first, last = self._x, size * stages[..., 0], size * stages[..., -1]
        s = self._per_image(fraction_B)
        a = 2 * (last - first) - 8 * (x_end + x) + 16 * middle
        b = 5 * first - 3 * last + 18 * x + 14 * x_end - 32 * middle
        c = last - 4 * first - 11 * x - 5 * x_end + 16 * middle
        return x + s * (first + s * (c + s * (b + s * a)))

    def _per_image(self, values_B: Numbers) -> Tensor:
        return per_image(torch.from_numpy(values_B).to(self._x), self._x)

    def _where(self, mask_B: npt.NDArray[np.bool_], new: Tensor, old: Tensor) -> Tensor:
        return torch.where(per_image(torch.from_numpy(mask_B).to(new.device), new), new, old)


def _combine(weights_k: Tensor, stages: Tensor, size: Tensor) -> Tensor:
    """Return the weighted sum of stages [B, C, H, W, k] times the step size.

    The terms are added in torchdiffeq's order: the error of a short step is dominated by rounding, and determines the
    size of the next step.
    """
    return (stages * (weights_k * size.unsqueeze(-1))).sum(-1)


def _norm(x: Tensor) -> Tensor:
    """Return the root mean square of every image, [B], reduced one by one: the batch does not affect rounding."""
    return torch.stack([image.square().mean().sqrt() for image in x])


def _to_host(values_B: Tensor) -> Numbers:
    numbers_B: Numbers = values_B.double().cpu().numpy()
    return numbers_B
