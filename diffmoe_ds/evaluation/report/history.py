"""The history of a run, read from its log files: ``metrics.jsonl``, ``validation.jsonl`` and TensorBoard events.

Every file is optional, and an incomplete last line of a killed run is ignored.

Legend: P points of a curve, N noise-level bins, E experts.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffmoe_ds.config.routing import AUXILIARY
from diffmoe_ds.control_files import open_regular, parse_json, read_lines

Numbers = npt.NDArray[np.float64]

CURVES = (
    "loss", "diffusion_loss", "capacity_loss", "repa_loss", *(f"{name}_loss" for name in AUXILIARY), "grad_norm", "lr",
    "images_per_s",
)  # fmt: skip
"""Keys of ``metrics.jsonl`` to draw as curves."""
MAX_POINTS = 600
"""Maximum number of points per curve; longer curves are averaged over equal numbers of rows."""
MAX_SERIES = 100
"""Most noise levels, and most metrics, that are drawn."""
NUMBERS = (1e-30, 1e30)
"""Smallest and largest magnitude of a logged number other than 0; axes and sums of others overflow."""
THRESHOLD_TAG = re.compile(r"threshold/(block_[0-9]{1,6})/[^/]{1,80}")
"""TensorBoard tags of thresholds, such as ``threshold/block_01/expert_00``."""
MAX_EVENT_BYTES = 64 << 20
"""Limit of a TensorBoard event; those with images have megabytes."""


class Curve(NamedTuple):
    """A value over the course of training."""

    images_P: Numbers
    """Images trained on."""
    value_P: Numbers
    """The value; its mean over the rows since the last point."""


@dataclass(frozen=True)
class Validation:
    """The rows of ``validation.jsonl``."""

    loss: Curve
    """Loss on held-out images."""
    by_noise_level: tuple[Curve, ...] = ()
    """Loss by noise level, N curves from clean images to noise."""
    metrics: Mapping[str, Curve] = field(default_factory=dict)
    """Metrics of generated images by name, such as ``frechet``, with the numbers of images (``n``, ``n_reference``)."""
    extractor: str = ""
    """Extractor of these metrics; empty if unknown."""
    held_out: Curve | None = None
    """Number of held-out images of each loss; None or empty if it was not logged."""


@dataclass(frozen=True)
class History:
    """Contents of the log files of a run."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Training curves by key; some of `CURVES`."""
    rows: int = 0
    """Optimizer steps in ``metrics.jsonl``."""
    seconds: float = 0.0
    """Duration of these steps."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last row of ``metrics.jsonl``."""
    validation: Validation | None = None
    """None without ``validation.jsonl``."""
    thresholds: Mapping[str, tuple[Curve, ...]] = field(default_factory=dict)
    """Thresholds of the experts by layer (``block_01``); empty without TensorBoard files."""


def read_history(run: Path) -> History:
    """Read the log files of a run directory.

    Args:
        run: the run directory; missing files are skipped.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    last: dict[str, Any] = {}
    seconds, before = 0.0, 0.0
    for row in log_rows(run / "metrics.jsonl"):
        for key in ("images", *CURVES):
            columns[key].append(_number(row.get(key)))
        speed = _number(row.get("images_per_s"))
        if speed > 0:
            seconds += max(_number(row["images"]) - before, 0) / speed
        before, last = _number(row["images"]), row
    curves = {key: _curve(columns["images"], columns[key]) for key in CURVES if key in columns}
    return History(
        curves={key: curve for key, curve in curves.items() if len(curve.images_P)},
        rows=len(columns["images"]),
        seconds=seconds,
        last=last,
        validation=_validation(list(log_rows(run / "validation.jsonl"))),
        thresholds=_thresholds(run / "tensorboard"),
    )


def log_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file that have an image count; nothing if the file cannot be read."""
    with contextlib.suppress(OSError):
        for line in read_lines(path):
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and math.isfinite(_number(row.get("images"))):
                yield row


def _number(value: Any) -> float:
    """Return a value of a log row as a float; NaN if it is not a number, or not one of `NUMBERS`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    return float(value) if value == 0 or NUMBERS[0] <= abs(value) <= NUMBERS[1] else math.nan


def _curve(images: list[float], values: list[float]) -> Curve:
    """Return the finite points of a curve, averaged so that at most `MAX_POINTS` remain."""
    images_P, value_P = np.array(images, np.float64), np.array(values, np.float64)
    kept = np.isfinite(value_P)
    images_P, value_P = images_P[kept], value_P[kept]
    if len(value_P) > MAX_POINTS:
        starts = np.linspace(0, len(value_P), MAX_POINTS, endpoint=False).astype(int)
        sizes = np.diff(np.append(starts, len(value_P)))
        images_P = images_P[starts + sizes - 1]
        value_P = np.add.reduceat(value_P, starts) / sizes
    return Curve(images_P, value_P)


def _validation(rows: list[dict[str, Any]]) -> Validation | None:
    if not rows:
        return None
    images = [float(row["images"]) for row in rows]
    levels = [row.get("validation_loss_by_noise_level") for row in rows]
    count = min(max((len(found) for found in levels if isinstance(found, list)), default=0), MAX_SERIES)
    by_level = []
    for level in range(count):
        values = [_number(row[level]) if isinstance(row, list) and level < len(row) else math.nan for row in levels]
        by_level.append(_curve(images, values))
    measured = [row["metrics"] if isinstance(row.get("metrics"), dict) else {} for row in rows]
    metrics = {}
    for name in list(dict.fromkeys(name for found in measured for name in found))[:MAX_SERIES]:
        curve = _curve(images, [_number(found.get(name)) for found in measured])
        if len(curve.images_P):
            metrics[name] = curve
    loss = _curve(images, [_number(row.get("validation_loss")) for row in rows])
    held_out = _curve(images, [_number(row.get("validation_images")) for row in rows])
    return Validation(loss, tuple(by_level), metrics, str(measured[-1].get("extractor", "")), held_out)


def _thresholds(directory: Path) -> dict[str, tuple[Curve, ...]]:
    """Read the thresholds from TensorBoard event files; none if any of the files is damaged."""
    files = list(directory.glob("*tfevents*"))
    if not files or not all(map(_has_bounded_events, files)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes half a second

    # a resumed run has several event files; 0 keeps all events
    events = EventAccumulator(str(directory), {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1})
    try:
        events.Reload()
    except Exception:  # TensorBoard and protobuf raise many types
        return {}
    experts: dict[str, list[Curve]] = defaultdict(list)
    for tag in sorted(events.Tags()["scalars"]):
        match = THRESHOLD_TAG.fullmatch(tag)
        if match is not None:
            found = events.Scalars(tag)
            values = [_number(event.value) for event in found]
            experts[match[1]].append(_curve([event.step for event in found], values))
    return {layer: tuple(curves) for layer, curves in experts.items()}


def _has_bounded_events(path: Path) -> bool:
    """Return whether a file is a regular one without huge events; TensorBoard waits for pipes and allocates any size.

    An event has a header of 12 bytes, which begins with its length, and a checksum of 4 bytes.
    """
    try:
        with open_regular(path) as file:
            while len(header := file.read(12)) == 12:
                length = int.from_bytes(header[:8], "little")
                if length > MAX_EVENT_BYTES:
                    return False
                file.seek(length + 4, os.SEEK_CUR)
    except OSError:
        return False
    return True
