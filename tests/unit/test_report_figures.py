"""Figures of a report for models that are larger than tests can run: many layers, experts and classes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from diffmoe_ds.evaluation.report import facts
from diffmoe_ds.evaluation.report.curves import SMOOTHED, moving_average, threshold_drawings, validation_drawings
from diffmoe_ds.evaluation.report.history import Curve, History, Validation
from diffmoe_ds.evaluation.report.probe import HeatMaps, Probe
from diffmoe_ds.evaluation.report.routing import (
    CLASS_SPAN,
    Routed,
    by_class,
    by_noise_level,
    compute_drawings,
    experts_taken,
    findings,
    heat_maps,
    load,
)
from diffmoe_ds.evaluation.report.style import Drawing, styled

LAYERS, EXPERTS, CLASSES = 12, 16, 30


@pytest.fixture(autouse=True)
def style():
    with styled():
        yield


@pytest.fixture
def routed() -> Routed:
    """Two images of each class; class 29 has the most experts per token, class 0 the fewest."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), 2)
    capacity = 1 + labels[:, None, None] / 100 + rng.uniform(0, 0.005, (len(labels), 10, LAYERS))
    capacity[:, 3] = np.nan  # no step at noise levels from 0.3 to 0.4
    capacity[:30, 8] = np.nan  # with adaptive steps, some images have none here
    capacity[:, 9] += 0.5
    pictures = rng.integers(0, 256, (len(labels), 8, 8, 3)).astype(np.uint8)
    heat = HeatMaps(
        level_IV=np.tile((0.95, 0.75, 0.5, 0.25, 0.05), (6, 1)),
        states_IV=(pictures[:6],) * 5,
        experts_IVRQ=rng.uniform(0, 3, (6, 5, 4, 4)),
        mean_IRQ=rng.uniform(0, 3, (6, 4, 4)),
    )
    tokens = rng.integers(0, 900, (LAYERS, EXPERTS))
    taken = rng.integers(0, 900, (LAYERS, EXPERTS + 1))
    probe = Probe(labels, pictures, tuple(range(1, 24, 2)), capacity, tokens, taken, heat)
    names = {label: f"a class with a long name {label}" for label in range(CLASSES)}
    return Routed(probe, 1.0, names, facts.CLASSES, "60 images")


def texts(drawing: Drawing) -> list[str]:
    """Return the labels of the ticks of a figure."""
    drawing.png()
    axes = drawing.figure.axes[0]
    return [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]]


def test_many_layers_and_classes(routed):
    drawings = {drawing.name: drawing for drawing in compute_drawings(routed)}
    assert len(drawings) == 6 and all(drawing.png().startswith(b"\x89PNG") for drawing in drawings.values())
    cells = drawings["capacity_by_layer"].figure.axes[0].images[0].get_array()
    assert cells.shape == (LAYERS, 10) and cells[:, 9].min() > cells[:, 8].max() and cells.mask[:, 3].all()
    assert "23" in texts(drawings["capacity_by_layer"])
    shown = texts(drawings["capacity_by_class"])
    assert (
        "a class with a long n…" in shown and "10 hardest and 10 easiest of 30" in drawings["capacity_by_class"].caption
    )
    assert texts(load(routed))[-1] == "23"


def test_findings_name_the_extremes(routed):
    text = findings(routed)
    assert "at noise level 0.95 (" in text and "The hardest class, a class with a long name 29, gets 1." in text


def test_thresholds_of_many_layers_and_without_history():
    curve = Curve(np.array([0.0, 100.0]), np.array([0.1, 0.3]))
    history = History(thresholds={f"block_{block:02d}": (curve, curve) for block in range(1, 24, 2)})
    final = {block: [0.1, 0.2] for block in range(1, 24, 2)}
    (many,) = threshold_drawings(history, final, "Not used.")
    assert len(many.figure.axes[0].lines) == LAYERS and "One line per MoE layer" in many.caption
    (last,) = threshold_drawings(History(), final, "Not used.")
    assert "Not used." in many.caption and "Not used." in last.caption
    assert "no TensorBoard history" in last.caption and len(last.figure.axes[0].collections) == LAYERS
    assert threshold_drawings(history, {}, "") == []


def curve(*values: float) -> Curve:
    return Curve(100.0 * np.arange(1, len(values) + 1), np.array(values))


def validation(extractor: str) -> Validation:
    metrics = {
        "n": curve(60, 60), "n_reference": curve(100, 2030), "kid": curve(0.6, 0.5), "kid_std": curve(0.1, 0.2),
        "inception_score": curve(1.0833, 1.0852), "precision": curve(0, 0),
    }  # fmt: skip
    levels = tuple(curve(*values) for values in np.linspace((3, 2, 1, 0.5, 0.4), (2, 1, 0.5, 0.1, 0.1), 10))
    return Validation(curve(2, 1), levels, metrics, extractor, curve(203, 203))


def test_metrics_state_their_images_and_start_at_their_bound():
    drawings = {drawing.name: drawing for drawing in validation_drawings(validation("efficientnet-lite0"))}
    score, axes = drawings["inception_score"], drawings["inception_score"].figure.axes[0]
    assert score.title == "Class score" and axes.get_ylabel() == "class score"
    assert "60 images generated" in score.caption and "100 to 2,030 held-out images" in score.caption
    assert "without intervals" in score.caption and axes.get_ylim()[0] == 1
    assert drawings["precision"].title == "Precision" and drawings["precision"].figure.axes[0].get_ylim() == (0, 1)
    assert "standard deviation" in drawings["kid"].caption and drawings["kid"].figure.axes[0].get_ylim()[1] > 0.7
    for name in ("validation_loss", "validation_by_noise_level"):
        assert "on 203 held-out images" in drawings[name].caption
    assert "Inception Score" in [drawing.title for drawing in validation_drawings(validation("inception:12ab"))]
    unknown = validation_drawings(Validation(curve(2, 1), metrics={"frechet": curve(3, 2)}))
    assert unknown[1].caption.startswith("Images generated") and "on held-out images" in unknown[0].caption


def test_a_subset_of_the_evaluations_is_called_one():
    for count, text in ((5, "one line per evaluation, by"), (6, "one line per evaluation (5 of 6 evaluations), by")):
        levels = (curve(*range(count)),) * 10
        drawings = {d.name: d for d in validation_drawings(Validation(curve(*range(count)), levels))}
        drawing = drawings["validation_by_noise_level"]
        assert len(drawing.figure.axes[0].lines) == 5 and text in drawing.caption


@pytest.mark.parametrize("mean", [0.1037, 1.04, 5.374, 16])
def test_classes_that_hardly_differ_do_not_look_like_a_ranking(routed, mean):
    few = np.full((4, 10, LAYERS), float(mean))
    few[0] -= 0.0013
    probe = replace(routed.probe, label_N=np.arange(4), capacity_NKL=few)
    drawing = by_class(replace(routed, probe=probe))[0]
    drawing.png()
    axes = drawing.figure.axes[0]
    low, high = axes.get_xlim()
    assert low < mean - 0.0013 and mean < high and high - low == pytest.approx(CLASS_SPAN * mean, rel=0.01)
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert 2 <= len(boxes) <= 5 and not any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ((0, 1, 2, 3), "noise levels and layers. The"),
        ((0, 0, 1, 1), "noise levels and layers, with a 95% interval over images. The"),
        ((0, 0, 1, 2), "noise levels and layers, with a 95% interval over images for classes with several. The"),
    ],
)
def test_only_existing_intervals_are_in_the_caption(routed, labels, text):
    probe = replace(routed.probe, label_N=np.array(labels), capacity_NKL=routed.probe.capacity_NKL[:4])
    assert text in by_class(replace(routed, probe=probe))[0].caption


def test_legends_do_not_cover_the_lines(routed):
    few = routed.probe.capacity_NKL[..., :2], routed.probe.taken_LT[:2]
    routed = replace(routed, probe=replace(routed.probe, layers=(1, 3), capacity_NKL=few[0], taken_LT=few[1]))
    levels = {drawing.name: drawing for drawing in validation_drawings(validation(""))}["validation_by_noise_level"]
    for drawing in (levels, by_noise_level(routed), experts_taken(routed)):
        drawing.png()
        axes = drawing.figure.axes[0]
        legend = axes.get_legend() or drawing.figure.legends[0]
        assert not legend.get_window_extent().overlaps(axes.get_window_extent()), drawing.name


def test_the_moving_average_starts_at_the_first_value():
    falling = np.linspace(10, 0, 100)
    averaged = moving_average(falling)
    assert averaged[0] == falling[0]
    np.testing.assert_allclose(averaged[: 100 - SMOOTHED // 2], falling[: 100 - SMOOTHED // 2])
    assert averaged[-1] == pytest.approx(falling[-(SMOOTHED // 2) - 1 :].mean())


def test_figures_that_are_constant_by_construction_are_omitted(routed):
    probe = routed.probe
    assert load(replace(routed, probe=replace(probe, tokens_LE=np.full((LAYERS, EXPERTS), 7)))) is None
    compete = np.ones_like(probe.capacity_NKL)
    compete[::2] += 0.2
    compete[1::2] -= 0.2
    names = [d.name for d in compute_drawings(replace(routed, probe=replace(probe, capacity_NKL=compete)))]
    assert "capacity_by_class" in names, "images differ"
    assert "capacity_by_noise_level" not in names and "capacity_by_layer" not in names


def test_the_scale_of_the_load_is_not_negative(routed):
    tokens = np.zeros((LAYERS, EXPERTS), int)
    tokens[:, 0] = 100
    shown = load(replace(routed, probe=replace(routed.probe, tokens_LE=tokens))).figure.axes[0].images[0]
    assert shown.get_clim() == (0, EXPERTS) and shown.norm(1) == 0.5


def test_a_sampler_step_is_shown_once(routed):
    heat = replace(routed.probe.heat_maps, level_IV=np.tile((1, 0.67, 0.67, 0.33, 0.33), (6, 1)))
    drawing = heat_maps(routed, heat)
    heads = [text.get_text() for text in drawing.figure.axes[0].texts if text.get_text().startswith("noise")]
    assert heads == ["noise 1.00", "noise 0.67", "noise 0.33"] and "at 3 noise levels" in drawing.caption


def test_a_band_that_cannot_be_seen_is_not_in_the_legend(routed):
    equal = np.broadcast_to(routed.probe.capacity_NKL[-1:], routed.probe.capacity_NKL.shape)
    for drawing, is_seen in (
        (by_noise_level(routed), True),
        (by_noise_level(replace(routed, probe=replace(routed.probe, capacity_NKL=equal))), False),
    ):
        assert ("80% of images" in [text.get_text() for text in drawing.figure.legends[0].texts]) == is_seen
        assert ("within the width of the mean's line" in drawing.caption) != is_seen
