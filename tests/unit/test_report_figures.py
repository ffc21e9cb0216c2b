"""Figures of a report for models that are larger than tests can run: many layers, experts and classes."""

from __future__ import annotations

import numpy as np
import pytest

from diffmoe_ds.evaluation.report.curves import threshold_drawings
from diffmoe_ds.evaluation.report.history import Curve, History
from diffmoe_ds.evaluation.report.probe import HeatMaps, Probe
from diffmoe_ds.evaluation.report.routing import Routed, compute_drawings, findings, load
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
    return Routed(probe, 1.0, names, "60 images")


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
    (many,) = threshold_drawings(history, final)
    assert len(many.figure.axes[0].lines) == LAYERS and "One line per MoE layer" in many.caption
    (last,) = threshold_drawings(History(), final)
    assert "no TensorBoard history" in last.caption and len(last.figure.axes[0].collections) == LAYERS
    assert threshold_drawings(history, {}) == []
