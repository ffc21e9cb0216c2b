"""Figures of training: losses, gradient norm, learning rate, throughput, validation and thresholds over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffmoe_ds.evaluation.report.history import Curve, History, Numbers, Validation
from diffmoe_ds.evaluation.report.style import (
    AMBER,
    BLUE,
    BROWN,
    COMPUTE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VIOLET,
    Drawing,
    depth_colors,
    images_axis,
    layer_name,
    panel,
    short_number,
)
from diffmoe_ds.evaluation.table import INCEPTION_LABELS, LABELS
from diffmoe_ds.text import counted

LOSSES = {
    "loss": ("total", INK),
    "diffusion_loss": ("diffusion", BLUE),
    "capacity_loss": ("capacity predictor", ORANGE),
    "balance_loss": ("load balance", GREEN),
    "repa_loss": ("alignment (REPA)", PURPLE),
    "z_loss": ("router z-loss", SKY),
    "orthogonality_loss": ("router orthogonality", BROWN),
    "contrastive_loss": ("routing contrastive", AMBER),
    "similarity_loss": ("router similarity", GRAY),
    "per_layer_loss": ("per-layer prediction", VIOLET),
}
"""Label and color of each loss."""
METRIC_STARTS = {"frechet": 0.0, "kid": 0.0, "inception_score": 1.0, "precision": 0.0, "recall": 0.0}
"""Metrics of generated images to draw, and where their axes start, so that noise does not fill the axis."""
SMOOTHED = 25
"""Window of the moving average, in points of a curve."""
SHOWN_EVALUATIONS = 5
"""Largest number of evaluations in the figure of validation loss by noise level."""
SHOWN_LAYERS = 4
"""Largest number of layers for which every expert's threshold is drawn."""


def training_drawings(history: History) -> list[Drawing]:
    """Return the figures of ``metrics.jsonl``; none without it."""
    steps = counted(history.rows, "logged step")
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
    is_smoothed = any(len(curve.images_P) >= 2 * SMOOTHED for curve in losses.values())
    how = "; light: every step or the mean of neighboring steps, dark: moving average" if is_smoothed else ""
    caption = f"{steps}{how}. Lower is better."
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
    axes.plot(x, moving_average(y), color=color, label=label)


def moving_average(y_P: Numbers) -> Numbers:
    """Return the mean over a centered window of `SMOOTHED` points.

    At the start, where losses fall fast, the window shrinks on both sides: otherwise, the average would start far
    below the first value. At the end, it is cut off, so that the average does not end at a single noisy value.
    """
    index = np.arange(len(y_P))
    reach = np.minimum(SMOOTHED // 2, index)
    start, stop = index - reach, np.minimum(index + reach + 1, len(y_P))
    total = np.concatenate([[0.0], np.cumsum(y_P)])
    mean_P: Numbers = (total[stop] - total[start]) / (stop - start)
    return mean_P


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
            f"EMA weights, on {count_images(validation.held_out, 'held-out images')} with fixed noise and times, so "
            "that points differ only in the weights. Lower is better; a rise while the training loss falls indicates "
            "overfitting."
        )
        drawings.append(Drawing("validation_loss", "Validation loss", caption, figure))
    if validation.by_noise_level and any(len(curve.images_P) for curve in validation.by_noise_level):
        drawings.append(_by_noise_level(validation))
    return [*drawings, *(_metric(name, validation) for name in METRIC_STARTS if name in validation.metrics)]


def count_images(counts: Curve | None, what: str) -> str:
    """Return the number of images of each evaluation, such as 203 held-out images.

    Args:
        counts: the number at each evaluation; None or empty if it was not logged.
        what: the images.
    """
    if counts is None or not len(counts.value_P):
        return what
    low, high = counts.value_P.min(), counts.value_P.max()
    return f"{low:,.0f} {what}" if low == high else f"{low:,.0f} to {high:,.0f} {what}"


def _metric(name: str, validation: Validation) -> Drawing:
    """Draw a metric of generated images."""
    metrics = validation.metrics
    label = (INCEPTION_LABELS if validation.extractor.startswith("inception:") else LABELS)[name]
    figure, axes = panel()
    (images_P, value_P), start, std = metrics[name], METRIC_STARTS[name], metrics.get(f"{name}_std")
    spread_P = np.zeros_like(value_P) if std is None or len(std.value_P) != len(value_P) else std.value_P
    axes.errorbar(images_P, value_P, spread_P, color=BLUE, marker="o", elinewidth=1.2, clip_on=False, zorder=3)
    low, high = (1.12 * (value - start) for value in ((value_P - spread_P).min(), (value_P + spread_P).max()))
    axes.set_ylim(start + min(low, 0), start + (high if high > 0 else 1))
    images_axis(axes)
    axes.set_ylabel(label)
    better = "Lower" if name in ("frechet", "kid") else "Higher"
    features = f", with the features of {validation.extractor}" if validation.extractor else ""
    reliability = "Bars: standard deviation over subsets." if spread_P.any() else "Points are without intervals."
    caption = (
        f"{count_images(metrics.get('n'), 'images')} generated with the EMA weights at each evaluation, against "
        f"{count_images(metrics.get('n_reference'), 'held-out images')}{features}. {reliability} {better} is better."
    )
    return Drawing(name, label[:1].upper() + label[1:], caption[:1].upper() + caption[1:], figure)


def _by_noise_level(validation: Validation) -> Drawing:
    from matplotlib import colormaps

    levels = validation.by_noise_level
    figure, axes = panel()
    evaluations = sorted({images for curve in levels for images in curve.images_P})
    shown = [evaluations[i] for i in np.unique(np.linspace(0, len(evaluations) - 1, SHOWN_EVALUATIONS).astype(int))]
    middles = (np.arange(len(levels)) + 0.5) / len(levels)
    for number, images in enumerate(shown):
        values = [dict(zip(*curve, strict=True)).get(images, np.nan) for curve in levels]
        color = colormaps[COMPUTE](0.85 * (1 - number / max(len(shown) - 1, 1)))
        axes.plot(middles, values, color=color, marker="o", label=short_number(images))
    axes.set(xlabel="noise level (0: clean, 1: noise)", ylabel="validation loss", xlim=(0, 1))
    axes.legend(title="images", loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the lines
    some = "" if len(shown) == len(evaluations) else f" ({len(shown)} of {len(evaluations)} evaluations)"
    caption = (
        f"The same loss on {count_images(validation.held_out, 'held-out images')}, in {len(levels)} bins of the noise "
        f"level; one line per evaluation{some}, by images trained on, from light (early) to dark (late). Shows at "
        "which noise levels the model is still improving."
    )
    return Drawing("validation_by_noise_level", "Validation loss by noise level", caption, figure)


def threshold_drawings(history: History, final: Mapping[int, Sequence[float]], meaning: str) -> list[Drawing]:
    """Return the figures of the capacity predictor's thresholds.

    Args:
        history: history of the run.
        final: thresholds of the experts of each MoE layer by block, from the checkpoint; empty without a predictor.
        meaning: a sentence on how the generated images depend on them.
    """
    if not final:
        return []
    if not history.thresholds:
        return [_final_thresholds(final, meaning)]
    layers = {int(name.removeprefix("block_")): curves for name, curves in history.thresholds.items()}
    if len(layers) > SHOWN_LAYERS:
        return [_mean_thresholds(layers, meaning)]
    return [_expert_thresholds(block, curves, meaning) for block, curves in layers.items()]


def _expert_thresholds(block: int, curves: Sequence[Curve], meaning: str) -> Drawing:
    figure, axes = panel()
    for expert, (curve, color) in enumerate(zip(curves, depth_colors(len(curves)), strict=True)):
        marker = "o" if len(curve.images_P) < 15 else None
        axes.plot(*curve, color=color, linewidth=1.2, marker=marker, label=f"{expert}")
    images_axis(axes)
    axes.set_ylabel("threshold")
    axes.legend(title="expert", ncols=max(1, -(-len(curves) // 8)), loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = f"One line per expert; they should have converged by the end of training. {meaning}"
    return Drawing(f"thresholds_block_{block:02d}", f"Thresholds over training, {layer_name(block)}", caption, figure)


def _mean_thresholds(layers: Mapping[int, Sequence[Curve]], meaning: str) -> Drawing:
    figure, axes = panel()
    for (block, curves), color in zip(layers.items(), depth_colors(len(layers)), strict=True):
        shortest = min(len(curve.images_P) for curve in curves)
        mean = np.mean([curve.value_P[:shortest] for curve in curves], axis=0)
        axes.plot(curves[0].images_P[:shortest], mean, color=color, linewidth=1.2, label=str(block))
    images_axis(axes)
    axes.set_ylabel("threshold, mean over experts")
    axes.legend(title="block", ncols=-(-len(layers) // 12), loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = f"One line per MoE layer, from dark (first) to light (last). {meaning}"
    return Drawing("thresholds", "Thresholds over training", caption, figure)


def _final_thresholds(final: Mapping[int, Sequence[float]], meaning: str) -> Drawing:
    figure, axes = panel()
    for number, values in enumerate(final.values()):
        axes.scatter([number] * len(values), values, color=BLUE, alpha=0.6, linewidths=0, s=24)
    axes.set_xticks(range(len(final)), [str(block) for block in final])
    axes.set(xlabel="block", ylabel="threshold", xlim=(-0.5, len(final) - 0.5))
    axes.set_ylim(bottom=0)
    caption = f"One dot per expert, in the checkpoint; the run has no TensorBoard history of thresholds. {meaning}"
    return Drawing("thresholds", "Final thresholds", caption, figure)
