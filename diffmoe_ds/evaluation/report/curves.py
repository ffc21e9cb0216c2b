"""Figures of training: losses, gradient norm, learning rate, throughput, validation and thresholds over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffmoe_ds.evaluation.report.history import Curve, History, Validation
from diffmoe_ds.evaluation.report.style import (
    BLUE,
    COMPUTE,
    GREEN,
    INK,
    ORANGE,
    Drawing,
    depth_colors,
    images_axis,
    layer_name,
    panel,
)

LOSSES = {
    "loss": ("total", INK),
    "diffusion_loss": ("diffusion", BLUE),
    "capacity_loss": ("capacity predictor", ORANGE),
    "balance_loss": ("load balance", GREEN),
}
"""Label and color of each loss."""
METRICS = {
    "fid": "FID",
    "frechet": "Frechet distance",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
"""Metrics of generated images to draw, and their labels."""
SMOOTHED = 25
"""Window of the moving average, in points of a curve."""
SHOWN_EVALUATIONS = 5
"""Largest number of evaluations in the figure of validation loss by noise level."""
SHOWN_LAYERS = 4
"""Largest number of layers for which every expert's threshold is drawn."""


def training_drawings(history: History) -> list[Drawing]:
    """Return the figures of ``metrics.jsonl``; none without it."""
    steps = f"{history.rows:,} logged step{'' if history.rows == 1 else 's'}"
    drawings = []
    losses = {key: history.curves[key] for key in LOSSES if key in history.curves and history.curves[key].value_P.any()}
    if len(losses) == 2:  # the total is the diffusion loss
        del losses["loss"]
    if losses:
        drawings.append(_losses(losses, steps))
    for key, title, label, color in (
        ("grad_norm", "Gradient norm", "gradient norm", BLUE),
        ("lr", "Learning rate", "learning rate", BLUE),
        ("images_per_s", "Throughput", "images per second", BLUE),
    ):
        if key in history.curves:
            drawings.append(_single(key, title, label, color, history.curves[key], steps))
    return drawings


def _losses(losses: Mapping[str, Curve], steps: str) -> Drawing:
    figure, axes = panel()
    for key, curve in losses.items():
        label, color = LOSSES[key]
        _line(axes, curve, color, label)
    cut = _limit(axes, list(losses.values()))
    images_axis(axes)
    axes.set_ylabel("loss")
    axes.legend(loc="upper right")
    caption = f"{steps}; light: every step or the mean of neighboring steps, dark: moving average. Lower is better."
    return Drawing("loss", "Training loss", caption + (" The first steps are off the scale." if cut else ""), figure)


def _single(key: str, title: str, label: str, color: str, curve: Curve, steps: str) -> Drawing:
    figure, axes = panel()
    captions = {
        "grad_norm": f"Before clipping; {steps}. Recurring spikes indicate an unstable run.",
        "lr": f"As used by the optimizer; {steps}.",
        "images_per_s": f"Over all ranks, per step; {steps}. Dips are caused by checkpoints or a busy host.",
    }
    _line(axes, curve, color, smooth=key != "lr")
    cut = _limit(axes, [curve])
    images_axis(axes)
    axes.set_ylabel(label)
    if key == "lr":
        axes.yaxis.set_major_formatter("{x:g}")
    return Drawing(key, title, captions[key] + (" Outliers are off the scale." if cut else ""), figure)


def _line(axes: Any, curve: Curve, color: Any, label: str | None = None, smooth: bool = True) -> None:
    """Draw a curve in light and its moving average in dark; few points are drawn with markers."""
    x, y = curve
    if len(x) < 2 * SMOOTHED or not smooth:
        axes.plot(x, y, color=color, label=label, marker="o" if len(x) < 15 else None)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    kernel = np.ones(SMOOTHED)
    smoothed = np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
    axes.plot(x, smoothed, color=color, label=label)


def _limit(axes: Any, curves: Sequence[Curve]) -> bool:
    """Start the y axis at 0, and cut off the largest 2% of the values if they would compress the rest."""
    every = np.concatenate([curve.value_P for curve in curves])
    highest, usual = every.max(), max(np.percentile(curve.value_P, 98) for curve in curves)
    is_cut = bool(highest > 1.5 * usual > 0)
    top = 1.12 * (usual if is_cut else highest)
    axes.set_ylim(min(0.0, 1.12 * every.min()), top if top > 0 else 1)
    return is_cut


def validation_drawings(validation: Validation | None) -> list[Drawing]:
    """Return the figures of ``validation.jsonl``; none without it."""
    if validation is None:
        return []
    drawings = []
    if len(validation.loss.images_P):
        figure, axes = panel()
        axes.plot(*validation.loss, color=BLUE, marker="o")
        images_axis(axes)
        axes.set_ylabel("validation loss")
        caption = (
            "EMA weights, on held-out images with fixed noise and times, so that points differ only in the weights. "
            "Lower is better; a rise while the training loss falls indicates overfitting."
        )
        drawings.append(Drawing("validation_loss", "Validation loss", caption, figure))
    if validation.by_noise_level and any(len(curve.images_P) for curve in validation.by_noise_level):
        drawings.append(_by_noise_level(validation.by_noise_level))
    for name in (name for name in METRICS if name in validation.metrics):
        figure, axes = panel()
        axes.plot(*validation.metrics[name], color=BLUE, marker="o")
        images_axis(axes)
        axes.set_ylabel(METRICS[name])
        better = "Lower" if name in ("fid", "frechet", "sfid", "kid") else "Higher"
        features = f", with the features of {validation.extractor}" if validation.extractor else ""
        caption = f"For images generated during training with the EMA weights{features}. {better} is better."
        drawings.append(Drawing(name, METRICS[name], caption, figure))
    return drawings


def _by_noise_level(levels: Sequence[Curve]) -> Drawing:
    from matplotlib import colormaps

    figure, axes = panel()
    evaluations = sorted({images for curve in levels for images in curve.images_P})
    shown = [evaluations[i] for i in np.unique(np.linspace(0, len(evaluations) - 1, SHOWN_EVALUATIONS).astype(int))]
    middles = (np.arange(len(levels)) + 0.5) / len(levels)
    for number, images in enumerate(shown):
        values = [dict(zip(*curve, strict=True)).get(images, np.nan) for curve in levels]
        color = colormaps[COMPUTE](0.85 * (1 - number / max(len(shown) - 1, 1)))
        axes.plot(middles, values, color=color, marker="o", label=f"{images:,.0f} images")
    axes.set(xlabel="noise level (0: clean, 1: noise)", ylabel="validation loss", xlim=(0, 1))
    axes.legend()
    caption = (
        f"The same loss in {len(levels)} bins of the noise level; one line per evaluation, from light (early) to dark "
        "(late). Shows at which noise levels the model is still improving."
    )
    return Drawing("validation_by_noise_level", "Validation loss by noise level", caption, figure)


def threshold_drawings(history: History, final: Mapping[int, Sequence[float]]) -> list[Drawing]:
    """Return the figures of the capacity predictor's thresholds.

    Args:
        history: history of the run.
        final: thresholds of the experts of each MoE layer by block, from the checkpoint; empty without a predictor.
    """
    if not final:
        return []
    if not history.thresholds:
        return [_final_thresholds(final)]
    layers = {int(name.removeprefix("block_")): curves for name, curves in history.thresholds.items()}
    if len(layers) > SHOWN_LAYERS:
        return [_mean_thresholds(layers)]
    return [_expert_thresholds(block, curves) for block, curves in layers.items()]


MEANING = "An expert takes a token if the capacity predictor's probability exceeds its threshold."


def _expert_thresholds(block: int, curves: Sequence[Curve]) -> Drawing:
    figure, axes = panel()
    for expert, (curve, color) in enumerate(zip(curves, depth_colors(len(curves)), strict=True)):
        marker = "o" if len(curve.images_P) < 15 else None
        axes.plot(*curve, color=color, linewidth=1.2, marker=marker, label=f"{expert}")
    images_axis(axes)
    axes.set_ylabel("threshold")
    axes.legend(title="expert", ncols=max(1, -(-len(curves) // 8)), loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = f"One line per expert. {MEANING} It should have converged by the end of training."
    return Drawing(f"thresholds_block_{block:02d}", f"Thresholds over training, {layer_name(block)}", caption, figure)


def _mean_thresholds(layers: Mapping[int, Sequence[Curve]]) -> Drawing:
    figure, axes = panel()
    for (block, curves), color in zip(layers.items(), depth_colors(len(layers)), strict=True):
        shortest = min(len(curve.images_P) for curve in curves)
        mean = np.mean([curve.value_P[:shortest] for curve in curves], axis=0)
        axes.plot(curves[0].images_P[:shortest], mean, color=color, linewidth=1.2, label=str(block))
    images_axis(axes)
    axes.set_ylabel("threshold, mean over experts")
    axes.legend(title="block", ncols=-(-len(layers) // 12), loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = f"One line per MoE layer, from dark (first) to light (last). {MEANING}"
    return Drawing("thresholds", "Thresholds over training", caption, figure)


def _final_thresholds(final: Mapping[int, Sequence[float]]) -> Drawing:
    figure, axes = panel()
    for number, values in enumerate(final.values()):
        axes.scatter([number] * len(values), values, color=BLUE, alpha=0.6, linewidths=0, s=24)
    axes.set_xticks(range(len(final)), [str(block) for block in final])
    axes.set(xlabel="block", ylabel="threshold", xlim=(-0.5, len(final) - 0.5))
    axes.set_ylim(bottom=0)
    caption = f"One dot per expert, in the checkpoint; the run has no TensorBoard history of thresholds. {MEANING}"
    return Drawing("thresholds", "Final thresholds", caption, figure)
