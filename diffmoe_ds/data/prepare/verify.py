"""Verify a dataset: read every byte of every shard, decode every sample, count keys and labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.control_files import MAX_INDEX_BYTES, read_json
from diffmoe_ds.data.sources.image_features import FeatureFormat
from diffmoe_ds.data.sources.index_files import INDEX, SAMPLES, load_index, refuse_unfinished, subset
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.tar_index import NO_LABEL, Entry, Index
from diffmoe_ds.data.sources.text_index import text_difference
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import sha256_of
from diffmoe_ds.text import counted
from diffmoe_ds.text_features import TextFormat

BATCH = 64
USUAL_STD = (0.5, 2.0)
"""Usual standard deviation of scaled latents.  Outside, the scaling factor does not suit the images."""


def check_set(path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Verify a directory of shards, or one shard.

    Args:
        path: directory or shard.
        progress: called with (shards done, shards).

    Returns:
        `shards`, `samples`, `labelled`, `per_class` (label to count), `classes` (names), `duplicate_keys`,
        `problems` (sentences; empty if the dataset is valid), `notes`, and for latents `format` and the mean and
        standard deviation of scaled latents, `latent_mean` and `latent_std`, as training samples them; for text
        features, `captions` (their number) and `text_encoders`; for image features, `features`.

    Raises:
        DataError: the path holds no shards.
    """
    shards = expand(path)
    problems: list[str] = []
    index, claims = _index(path, problems)
    hashes = claims["sha256"]
    sums = _Sums()
    there = [shard for shard in shards if os.path.exists(shard)]
    for done, shard in enumerate(there, 1):
        found = _bytes_problems(Path(shard), hashes)
        problems += found or _sample_problems(shard, index, sums)
        progress(done, len(there))
    for shard in sorted(set(shards).difference(there)):
        problems.append(f"shard {Path(shard).name} is missing")
    labels, classes = sums.labels, claims["classes"]
    duplicates = sorted(key for key, count in sums.keys.items() if count > 1)
    problems += _label_problems(labels, classes)
    problems += [f"duplicate key {key!r}: {sums.keys[key]} samples" for key in duplicates]
    report: dict[str, Any] = {
        "shards": len(there),
        "samples": sum(labels.values()),
        "classes": classes,
        "notes": [],
        "labelled": bool(labels) and NO_LABEL not in labels,
        "per_class": {str(label): labels[label] for label in sorted(labels) if label != NO_LABEL},
        "duplicate_keys": duplicates,
    }
    if sums.latents is not None and sums.statistics[0]:
        report["format"] = sums.latents.to_json()
        _add_statistics(report, sums.latents, sums.statistics)
    if sums.text is not None:
        report["captions"] = sums.captions
        report["text_encoders"] = sums.text.to_json()["encoders"]
    if sums.features is not None:
        report["features"] = sums.features.to_json()
    return {**report, "problems": problems}


def report_lines(report: dict[str, Any]) -> str:
    """Return the report of `check_set` as text."""
    lines = [f"{report['samples']:,} samples in {report['shards']} shards"]
    names = report["classes"] or []
    for label, count in report["per_class"].items():
        name = names[int(label)] if int(label) < len(names) else ""
        lines.append(f"  class {label:>4}  {count:>9,}  {name}")
    if not report["labelled"]:
        lines.append("  no labels")
    if "format" in report:
        form = report["format"]
        lines.append(
            f"latents {form['channels']}x{form['size']}x{form['size']} in {form['dtype']}, scaled by "
            f"{form['scaling_factor']:g}: mean {report['latent_mean']:.4f}, "
            f"standard deviation {report['latent_std']:.4f}"
        )
    if "captions" in report:
        encoders = [
            f"{each['name']} ({each['tokens']} tokens of width {each['width']})" for each in report["text_encoders"]
        ]
        lines.append(f"{counted(report['captions'], 'caption')} encoded by {' and '.join(encoders)}")
    if "features" in report:
        form = report["features"]
        lines.append(f"image features of {form['name']}: {form['side']}x{form['side']} tokens of width {form['width']}")
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join(lines)


@dataclass
class _Sums:
    """Totals over all shards."""

    labels: Counter[int] = field(default_factory=Counter)
    keys: Counter[Any] = field(default_factory=Counter)
    latents: LatentFormat | None = None
    text: TextFormat | None = None
    features: FeatureFormat | None = None
    captions: int = 0
    """Captions with text features."""
    statistics: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """Number of values, sum of means, sum of second moments."""


def _index(path: Path, problems: list[str]) -> tuple[Index | None, dict[str, Any]]:
    """Return the index, and `classes` and `sha256` by shard from `index.json`; None for what it does not contain."""
    index, claims = None, {"classes": None, "sha256": None}
    try:
        refuse_unfinished(path)
        if not (path / INDEX).exists():
            return None, claims
        index = load_index(path, rehash=True)
    except DataError as error:
        problems.append(str(error))
    try:  # also if another file of the index is damaged
        tree = read_json(path / INDEX, MAX_INDEX_BYTES)
        classes, hashes = tree.get("classes"), tree.get("sha256")
    except (OSError, ValueError, AttributeError):
        return index, claims
    if not isinstance(classes, (list, type(None))) or not isinstance(hashes, dict):
        problems.append(f"{path / INDEX} lacks the table sha256 of the shards, or its classes are not a list of names")
        return index, claims
    return index, {"classes": classes, "sha256": hashes}


def _bytes_problems(shard: Path, hashes: dict[str, str] | None) -> list[str]:
    """Return the problems of a shard's file; `hashes` come from the index, if there is one."""
    expected = None if hashes is None else hashes.get(shard.name)
    if hashes is not None and expected is None:
        return [f"shard {shard.name} is not in {INDEX}"]
    try:
        found = sha256_of(shard)
    except OSError as error:
        return [f"shard {shard.name} cannot be read: {error.strerror}"]
    if expected not in (None, found):
        return [
            f"shard {shard.name} has the sha256 {found[:12]}..., but {INDEX} says {str(expected)[:12]}...: it has "
            "changed"
        ]
    return []


def _sample_problems(shard: str, index: Index | None, sums: _Sums) -> list[str]:
    """Return the problems of a shard's samples, and add them to the sums.

    The shard is opened alone and without the index, which could hide its contents, and closed again: a dataset may have
    more shards than a process may open files.
    """
    try:
        dataset = ShardDataset([shard], use_index=False)
    except DataError as error:
        return [] if "there is no sample" in str(error) else [str(error)]
    keys = [dataset.key(i) for i in range(len(dataset))]
    sums.latents = dataset.latents or sums.latents
    sums.text = sums.text or dataset.text
    sums.features = sums.features or dataset.features
    sums.labels.update(dataset.labels.tolist())
    sums.keys.update(keys)
    problems = [] if index is None else _differences(Path(shard).name, dataset.index, keys, index)
    for first in range(0, len(dataset), BATCH):
        problems += _decode(dataset, range(first, min(first + BATCH, len(dataset))), sums.statistics)
    return problems + _caption_problems(dataset, sums) + _feature_problems(dataset, sums)


def _caption_problems(dataset: ShardDataset, sums: _Sums) -> list[str]:
    """Return the problems of a shard's text, and count its captions with text features."""
    difference = text_difference(dataset.text, sums.text)
    if difference is not None:
        return [f"shard {dataset.index.shards[0].name} holds other text features than the first shard: {difference}"]
    problems = []
    for index in range(len(dataset) if dataset.text is not None else 0):
        try:
            dataset.captions(index)
            sums.captions += len(dataset.read_captions(index))
        except DataError as error:
            problems.append(str(error))
    return problems


def _feature_problems(dataset: ShardDataset, sums: _Sums) -> list[str]:
    """Return the problems of a shard's image features."""
    if dataset.features != sums.features:
        return [f"shard {dataset.index.shards[0].name} holds other image features than the first shard"]
    problems = []
    for index in range(len(dataset) if dataset.features is not None else 0):
        try:
            dataset.read_features([index, index], [False, True])
        except DataError as error:
            problems.append(str(error))
    return problems


def _differences(name: str, found: Index, keys: list[str], whole: Index) -> list[str]:
    """Compare a shard with the index of the whole dataset, by which training reads it."""
    said = subset(whole, [name])
    if said is None:
        return [f"shard {name} is not in {SAMPLES}"]
    formats = ((index.latents, index.text_format, index.feature_format) for index in (said, found))
    if len(set(formats)) > 1 or len(said.samples) != len(keys) or said.shards[0].bytes != found.shards[0].bytes:
        return [
            f"{INDEX} gives shard {name} other sizes, another number of samples or other latents, text features or "
            "image features than it has"
        ]
    content = slice(Entry._fields.index("suffix"), Entry._fields.index("label") + 1)
    other = (said.samples[:, content] != found.samples[:, content]).any(axis=1)
    other |= np.array([said.key(i) != key for i, key in enumerate(keys)])
    if said.text is not None:  # an index from before captions were indexed lacks it
        other |= (said.text != (0 if found.text is None else found.text)).any(axis=1)
    if said.features is not None:
        other |= (said.features != found.features).any(axis=1)
    if not other.any():
        return []
    return [
        f"the index gives {other.sum()} samples of shard {name} another offset, label, key, text or features than the "
        f"shard, the first is {keys[int(np.argmax(other))]!r}"
    ]


def _decode(dataset: ShardDataset, indices: range, statistics: np.ndarray) -> list[str]:
    """Return the problems of some samples; add to (number of values, sum of means, sum of second moments)."""
    problems = []
    if dataset.latents is None:
        for index in indices:
            try:
                dataset[index]
            except DataError as error:
                problems.append(str(error))
        return problems
    for mirror in (False, True):
        try:
            stored = dataset.read_moments(indices, [mirror] * len(indices))
        except DataError as error:
            return [str(error)]
        moments = dataset.latents.decode(stored).astype(np.float64)
        finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
        problems += [f"{dataset.describe(indices[int(row)])} contains NaN or Inf" for row in np.flatnonzero(~finite)]
        mean, log_variance = moments[finite, 0], moments[finite, 1]
        statistics += mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()
    return problems


def _label_problems(labels: Counter[int], classes: list[str] | None) -> list[str]:
    problems = []
    if NO_LABEL in labels and len(labels) > 1:
        problems.append(f"{labels[NO_LABEL]} samples have no label, but others do")
    highest = max(labels, default=NO_LABEL)
    if classes is not None and highest >= len(classes):
        problems.append(f"the label {highest} has no name: the index lists {len(classes)} classes")
    return problems


def _add_statistics(report: dict[str, Any], latents: LatentFormat, statistics: np.ndarray) -> None:
    count, total, squares = statistics.tolist()
    mean, std = total / count, max(squares / count - (total / count) ** 2, 0.0) ** 0.5
    report["latent_mean"] = (mean - latents.shift_factor) * latents.scaling_factor
    report["latent_std"] = std * latents.scaling_factor
    if not USUAL_STD[0] <= report["latent_std"] <= USUAL_STD[1]:
        report["notes"].append(
            f"scaled latents have a standard deviation of {report['latent_std']:.3g}, where about 1 is usual: a "
            f"scaling factor of {1 / std if std else float('inf'):.4g} would give 1, the VAE's is "
            f"{latents.scaling_factor:g}"
        )
