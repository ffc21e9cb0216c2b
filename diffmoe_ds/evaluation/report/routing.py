"""Routing figures: compute per token over the image, capacity by noise level, layer and label, load, experts taken.

Legend: N images, K bins of the noise level, L MoE layers, E experts, M labels: classes or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmoe_ds.evaluation.report.facts import Nouns
from diffmoe_ds.evaluation.report.probe import NOISE_BINS, Array, HeatMaps, Probe
from diffmoe_ds.evaluation.report.style import (
    BALANCE,
    BLUE,
    COMPUTE,
    INK,
    MUTED,
    SHEET_WIDTH,
    Drawing,
    PictureRow,
    Sheet,
    depth_colors,
    layer_name,
    panel,
    picture_sheet,
    shorten,
    wrapped,
)

LINES = 4
"""Maximum number of layers drawn as lines; more are drawn as a heat map."""
SHOWN_CLASSES = 20
"""Largest number of labels in the figure of capacity by label."""
CLASS_SPAN = 0.05
"""Smallest span of its axis as a fraction of the mean, so that nearly equal labels do not look like a ranking."""
HEAT_MAPS = {"class": 4, "prompt": 8}
"""Largest number of images in the figure of compute per token, by what the labels are."""
NARROWEST_SHEET = 3.6
"""Smallest width of this figure in inches, for the labels of its rows."""


@dataclass(frozen=True)
class Routed:
    """Data of the routing figures."""

    probe: Probe
    """Probe of a model with experts."""
    capacity: float
    """The training capacity C."""
    names: Mapping[int, str]
    """Names of the classes by label, or the prompts."""
    nouns: Nouns
    """Which of these."""
    evidence: str
    """Number of images and steps in the figures, such as ``160 images, 25 steps each``."""

    @property
    def capacity_NKL(self) -> Array:
        """Experts per token; see `Probe`."""
        assert self.probe.capacity_NKL is not None, "a model with experts"
        return self.probe.capacity_NKL

    @property
    def capacity_N(self) -> Array:
        """Experts per token of each image, averaged over all noise levels and layers."""
        mean_N: Array = np.nanmean(self.capacity_NKL, axis=(1, 2))
        return mean_N


def by_noise_level(routed: Routed) -> Drawing | None:
    """Draw experts per token over the noise level; None if the routing rule keeps it constant."""
    capacity_NKL = routed.capacity_NKL
    is_seen_K = ~np.isnan(capacity_NKL).all((0, 2))
    level = ((np.arange(NOISE_BINS) + 0.5) / NOISE_BINS)[is_seen_K]
    image_NK = capacity_NKL[:, is_seen_K].mean(2)  # NaN where adaptive steps skip a bin
    layer_KL = np.nanmean(capacity_NKL[:, is_seen_K], axis=0)
    if np.ptp(layer_KL) < 1e-3:  # images that compete for a fixed total may still differ
        return None
    figure, axes = panel()
    low, high = np.nanpercentile(image_NK, (10, 90), axis=0)
    top = max(1.12 * high.max(), 1.12 * layer_KL.max(), 1.2 * routed.capacity)
    has_band = bool((high - low).max() > 0.03 * top)  # otherwise the line of the mean would hide it
    if has_band:
        axes.fill_between(level, low, high, color=INK, alpha=0.12, linewidth=0, label="80% of images")
    if len(routed.probe.layers) <= LINES:
        for block, values, color in zip(routed.probe.layers, layer_KL.T, depth_colors(layer_KL.shape[1]), strict=True):
            axes.plot(level, values, color=color, linewidth=1.2, marker="o", label=layer_name(block))
    axes.plot(level, layer_KL.mean(1), color=INK, linewidth=2, label="mean")
    _training_capacity(axes, routed.capacity)
    axes.set(xlabel="noise level (0: clean, 1: noise)", ylabel="experts per token", xlim=(0, 1))
    axes.set_ylim(0, top)
    figure.legend(ncols=3, loc="outside upper center", columnspacing=1.2)
    caption = (
        f"{routed.evidence}; sampling proceeds from right to left. The dashed line is the training capacity. "
        "The model uses more compute where the line is higher."
    )
    if not has_band:
        caption += " 80% of the images are within the width of the mean's line."
    return Drawing("capacity_by_noise_level", "Experts per token by noise level", caption, figure)


def by_layer(routed: Routed) -> Drawing:
    """Draw experts per token by layer: bars, or a heat map over the noise level for many layers."""
    layers = routed.probe.layers
    capacity_NKL = routed.capacity_NKL
    images_K = (~np.isnan(capacity_NKL[..., 0])).sum(0)
    with np.errstate(invalid="ignore"):
        layer_KL = np.nansum(capacity_NKL, axis=0) / images_K[:, None]  # NaN where the sampler takes no step
    figure, axes = panel()
    if len(layers) <= LINES:
        mean_L = np.nanmean(layer_KL, axis=0)
        axes.bar(range(len(layers)), mean_L, width=0.5, color=BLUE)
        for number, value in enumerate(mean_L):
            axes.text(number, value / 2, f"{value:.2f}", ha="center", va="center", color="white")
        _training_capacity(axes, routed.capacity)
        axes.set_xticks(range(len(layers)), [layer_name(block) for block in layers])
        axes.set(ylabel="experts per token", xlim=(-0.7, len(layers) - 0.3))
        axes.set_ylim(0, 1.2 * max(mean_L.max(), routed.capacity))
        caption = f"{routed.evidence}; mean over noise levels. The dashed line is the training capacity."
    else:
        shown = axes.imshow(layer_KL.T, aspect="auto", cmap=COMPUTE, extent=(0, 1, len(layers) - 0.5, -0.5), vmin=0)
        axes.grid(visible=False)
        ticks = range(0, len(layers), 1 + len(layers) // 15)
        axes.set_yticks(ticks, [str(layers[number]) for number in ticks])
        axes.set(xlabel="noise level (0: clean, 1: noise)", ylabel="block")
        figure.colorbar(shown, label="experts per token").outline.set_visible(False)
        caption = f"{routed.evidence}. Yellow cells are layers and noise levels where tokens take many experts."
    return Drawing("capacity_by_layer", "Experts per token by layer", caption, figure)


def by_class(routed: Routed) -> list[Drawing]:
    """Draw experts per token by label and pictures of the hardest and easiest ones; nothing for a single label or
    if the rule gives all images the same capacity."""
    one, many = routed.nouns
    labels_M, mean_M, error_M = class_capacity(routed.probe.label_N, routed.capacity_N)
    if len(labels_M) < 2 or np.ptp(routed.capacity_N) < 1e-3:
        return []
    half = SHOWN_CLASSES // 2
    position = np.arange(len(labels_M))
    if len(position) > SHOWN_CLASSES:
        position = np.concatenate([position[:half], position[-half:]])
    shown = labels_M[position]
    figure, axes = panel(height=max(1.9, 0.95 + 0.185 * len(shown)))
    rows = np.arange(len(shown))
    axes.errorbar(
        mean_M[position], rows, xerr=error_M[position], fmt="o", color=BLUE, ecolor=BLUE, elinewidth=1.2, capsize=0
    )
    axes.axvline(mean_M.mean(), color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(rows, [shorten(routed.names[label], 22) for label in shown])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("experts per token")
    _span_at_least(axes, CLASS_SPAN * mean_M.mean())
    some = "" if len(shown) == len(labels_M) else f" The {half} hardest and {half} easiest of {len(labels_M)} {many}."
    caption = (
        f"{routed.evidence}; mean over noise levels and layers{_interval(routed.probe.label_N, many)}. The dotted line "
        f"is the mean of all {many}. {many.capitalize()} at the top get the most compute.{some}"
    )
    return [Drawing(f"capacity_by_{one}", f"Experts per token by {one}", caption, figure), _extremes(routed, labels_M)]


def _span_at_least(axes: Any, span: float) -> None:
    """Widen the x axis around its middle to a minimum span, with so few ticks that their labels fit."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    missing = max(0.0, span - (high - low))
    axes.set_xlim(low - missing / 2, high + missing / 2)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))


def _interval(label_N: Array, many: str) -> str:
    """Return what the caption says about intervals; a label with a single image has none."""
    counts_M = np.unique(label_N, return_counts=True)[1]
    if counts_M.max() == 1:
        return ""
    return ", with a 95% interval over images" + (f" for {many} with several" if counts_M.min() == 1 else "")


def class_capacity(label_N: Array, capacity_N: Array) -> tuple[Array, Array, Array]:
    """Return labels, mean capacity and half its 95% interval (0 for a single image) of each label, hardest first.

    Args:
        label_N: label of each image.
        capacity_N: experts per token of each image.
    """
    labels = np.unique(label_N)
    groups = [capacity_N[label_N == label] for label in labels]
    mean = np.array([group.mean() for group in groups])
    error = np.array([1.96 * group.std(ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0 for group in groups])
    order = np.argsort(-mean, kind="stable")
    return labels[order], mean[order], error[order]


def _extremes(routed: Routed, labels_M: Array) -> Drawing:
    """Draw pictures of the hardest and easiest labels, each with its images from hard to easy."""
    count = min(3, len(labels_M) // 2)
    capacity_N = routed.capacity_N
    rows = []
    for number, label in enumerate([*labels_M[:count], *labels_M[-count:]]):
        found = np.flatnonzero(routed.probe.label_N == label)
        found = found[np.argsort(-capacity_N[found], kind="stable")]
        chosen = found[np.unique(np.linspace(0, len(found) - 1, 6).astype(int))]
        text = f"{wrapped(routed.names[label], 14, lines=3)}\n{capacity_N[found].mean():.2f}"
        rows.append(PictureRow(text, [routed.probe.picture_NHWC[i] for i in chosen], starts_group=number == count))
    caption = (
        f"Top {count} rows: the {routed.nouns[count > 1]} with the most experts per token (the number is the "
        f"mean); bottom {count}: with the fewest. Each row is ordered from most to fewest. {routed.evidence}."
    )
    many = routed.nouns.many
    return picture_sheet(f"hardest_and_easiest_{many}", f"Hardest and easiest {many}", caption, rows)


def heat_maps(routed: Routed, heat: HeatMaps) -> Drawing:
    """Draw the compute per token over a few images at several noise levels, next to the images."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    images = len(heat.experts_IVRQ)
    order = np.argsort(-heat.mean_IRQ.mean((1, 2)), kind="stable")
    chosen = order[np.unique(np.linspace(0, images - 1, min(HEAT_MAPS[routed.nouns.one], images)).astype(int))]
    top = float(np.percentile(heat.experts_IVRQ[chosen], 99.5)) or 1.0
    # with few sampler steps, one step is the nearest to several noise levels
    level_IV = heat.level_IV[chosen]
    levels = [v for v in range(level_IV.shape[1]) if v == 0 or not np.array_equal(level_IV[:, v], level_IV[:, v - 1])]
    gap, head, between = 0.05, 0.42, 0.34
    side = (SHEET_WIDTH - gap) / (level_IV.shape[1] + 1) - gap
    pair = 2 * side + gap + between
    width = max(NARROWEST_SHEET, gap + (len(levels) + 1) * (side + gap))
    sheet = Sheet(width, head + len(chosen) * pair + 0.5)
    colors = {"cmap": COMPUTE, "vmin": 0.0, "vmax": top, "interpolation": "nearest"}
    for column, text in enumerate(["generated", *(f"noise {level_IV[:, v].mean():.2f}" for v in levels)]):
        sheet.write(text, gap + column * (side + gap) + side / 2, 0.12, ha="center", va="center", fontsize=8.5)
    for row, image in enumerate(chosen):
        y = head + row * pair
        name, mean = routed.names[int(routed.probe.label_N[image])], heat.mean_IRQ[image].mean()
        sheet.write(f"{shorten(name, 40)}: {mean:.2f} experts per token", gap, y - 0.06, va="bottom", weight="bold")
        sheet.place(routed.probe.picture_NHWC[image], gap, y, side)
        sheet.place(heat.mean_IRQ[image], gap, y + side + gap, side, **colors)
        for column, v in enumerate(levels, 1):
            x = gap + column * (side + gap)
            sheet.place(heat.states_IV[v][image], x, y, side)
            sheet.place(heat.experts_IVRQ[image, v], x, y + side + gap, side, **colors)
    shades = ScalarMappable(Normalize(0, top), COMPUTE)
    sheet.color_bar(shades, "experts per token", width * 0.25, head + len(chosen) * pair - 0.14, width / 2)
    where = "noise level" if len(levels) == 1 else "noise levels"
    caption = (
        f"{len(chosen)} of {images} images, from most to least compute. Upper row of each: the generated image and "
        f"the sampler state at {len(levels)} {where}. Lower row: the number of experts that each token takes, averaged "
        f"over {len(routed.probe.layers)} MoE layers and, below the generated image, over all steps. Bright tokens get "
        "more compute; all maps share one color scale."
    )
    return Drawing("compute_per_token", "Compute per token over the image", caption, sheet.figure, is_wide=True)


def load(routed: Routed) -> Drawing | None:
    """Draw the tokens of each expert, relative to the mean of its layer; None if all are equal."""
    from matplotlib.colors import TwoSlopeNorm

    tokens_LE = routed.probe.tokens_LE
    assert tokens_LE is not None, "a model with experts"
    load_LE = tokens_LE / np.maximum(tokens_LE.mean(1, keepdims=True), 1e-9)
    if np.ptp(load_LE) < 1e-3:
        return None
    layers, experts = load_LE.shape
    figure, axes = panel(SHEET_WIDTH, height=max(1.7, 1.05 + 0.22 * layers))
    reach = max(0.25, float(np.abs(load_LE - 1).max()))
    norm = TwoSlopeNorm(1, vmin=max(0, 1 - reach), vmax=1 + reach)
    shown = axes.imshow(load_LE, aspect="auto", cmap=BALANCE, norm=norm)
    axes.grid(visible=False)
    axes.set_xticks(range(experts))
    axes.set_yticks(range(layers), [str(block) for block in routed.probe.layers])
    axes.set(xlabel="expert", ylabel="block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if experts <= 8:
        for (row, column), value in np.ndenumerate(load_LE):
            color = "white" if abs(norm(value) - 0.5) > 0.35 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(shown, label="load").outline.set_visible(False)
    caption = (
        f"{routed.evidence}. Tokens that an expert takes, divided by the mean of its layer: 1 is balanced, 0 is an "
        "unused expert."
    )
    return Drawing("load_per_expert", "Load per expert", caption, figure, is_wide=True)


def experts_taken(routed: Routed) -> Drawing:
    """Draw the distribution of the number of experts that a token takes in a layer."""
    taken_LT = routed.probe.taken_LT
    assert taken_LT is not None, "a model with experts"
    share_LT = 100 * taken_LT / taken_LT.sum(1, keepdims=True)
    figure, axes = panel()
    most = int(np.flatnonzero(share_LT.max(0) >= 0.05)[-1])  # 0.05% cannot be seen
    share_LT = share_LT[:, : most + 1]
    x, mean_T = np.arange(most + 1), share_LT.mean(0)
    axes.bar(x, mean_T, color=BLUE, width=0.7, label="mean of all layers" if len(share_LT) > 1 else None)
    if len(share_LT) > 1:
        axes.vlines(x, share_LT.min(0), share_LT.max(0), color=INK, linewidth=1.2, label="range over layers")
        figure.legend(ncols=2, loc="outside upper center")
    axes.set(xlabel="experts that a token takes in a layer", ylabel="tokens (%)")
    axes.set_xticks(x)
    caption = (
        f"{routed.evidence}. {mean_T[0]:.0f}% of the tokens take no expert: they bypass an MoE layer through its "
        "residual connection."
    )
    return Drawing("experts_taken", "Number of experts per token", caption, figure)


def _training_capacity(axes: Any, capacity: float) -> None:
    axes.axhline(capacity, color=MUTED, linewidth=1, linestyle="--")


def compute_drawings(routed: Routed) -> list[Drawing]:
    """Return the figures of compute per token, omitting those that the routing rule makes constant."""
    heat = routed.probe.heat_maps
    if heat is None or np.ptp(heat.experts_IVRQ) < 1e-3:
        return []
    noise = by_noise_level(routed)
    panels = [] if noise is None else [noise, by_layer(routed)]
    classes = by_class(routed)
    return [heat_maps(routed, heat), *panels, *classes[:1], experts_taken(routed), *classes[1:]]


def findings(routed: Routed) -> str:
    """Summarize the compute figures in a few sentences."""
    capacity_NKL = routed.capacity_NKL
    text = [f"On average, a token takes {np.nanmean(capacity_NKL):.2f} experts in a layer."]
    is_seen_K = ~np.isnan(capacity_NKL).all((0, 2))
    level_K = np.nanmean(capacity_NKL[:, is_seen_K], axis=(0, 2))
    middle_K = ((np.arange(NOISE_BINS) + 0.5) / NOISE_BINS)[is_seen_K]
    if np.ptp(level_K) >= 0.01:
        high, low = level_K.argmax(), level_K.argmin()
        text.append(
            f"Tokens take the most at noise level {middle_K[high]:.2f} ({level_K[high]:.2f}) and the fewest at "
            f"{middle_K[low]:.2f} ({level_K[low]:.2f})."
        )
    labels_M, mean_M, _ = class_capacity(routed.probe.label_N, routed.capacity_N)
    if len(labels_M) > 1 and mean_M[0] >= 1.01 * mean_M[-1] > 0:
        most, fewest = (routed.names[int(label)] for label in labels_M[[0, -1]])
        text.append(
            f"The hardest {routed.nouns.one}, {most}, gets {mean_M[0] / mean_M[-1]:.2f} times the compute of {fewest}."
        )
    return " ".join(text)
