"""Is a set whole?  Every byte of every shard is read, every sample decoded, keys and labels counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.data.latents import LatentFormat
from diffmoe_ds.data.shard_paths import expand
from diffmoe_ds.data.shards import ShardDataset
from diffmoe_ds.data.tar_index import INDEX, NO_LABEL, load_index
from diffmoe_ds.data.writer import sha256_of
from diffmoe_ds.errors import DataError

BATCH = 64
USUAL_STD = (0.5, 2.0)
"""Of scaled latents: outside, the scaling factor is not that of these images."""


def check_set(path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Look at everything below a directory of shards, or at one shard.

    Args:
        path: directory or shard.
        progress: called with (samples done, samples).

    Returns:
        ``shards``, ``samples``, ``labelled``, ``per_class`` (label to count), ``classes`` (names), ``duplicate_keys``,
        ``problems`` (sentences; empty if all is well), ``notes``, and for latents ``format`` and the mean and standard
        deviation of scaled latents, ``latent_mean`` and ``latent_std``, as training would draw them.

    Raises:
        DataError: there are no shards.
    """
    problems: list[str] = []
    shards = expand(path)
    tree = _index_tree(path)
    whole = []
    for shard in shards:
        found = _problem(Path(shard), tree)
        problems += found
        if not found:
            whole.append(shard)
    for name in sorted(set(tree.get("sha256", {})) - {Path(shard).name for shard in shards}):
        problems.append(f"shard {name} is missing")
    if path.is_dir() and (path / INDEX).exists():
        try:
            load_index(path)
        except DataError as error:
            problems.append(str(error))
    report: dict[str, Any] = {"shards": len(shards), "samples": 0, "classes": tree.get("classes"), "notes": []}
    labels, keys, statistics = Counter(), Counter(), np.zeros(3)
    latents = None
    sets = []
    for shard in whole:  # one by one and without the index, which must not hide what a shard says
        try:
            sets.append(ShardDataset([shard], use_index=False))
        except DataError as error:
            if "there is no sample" not in str(error):
                problems.append(str(error))
    total, done = sum(map(len, sets)), 0
    for dataset in sets:
        latents = dataset.latents or latents
        labels.update(dataset.labels.tolist())
        keys.update(dataset.key(i) for i in range(len(dataset)))
        for first in range(0, len(dataset), BATCH):
            indices = range(first, min(first + BATCH, len(dataset)))
            problems += _decode(dataset, indices, statistics)
            done += len(indices)
            progress(done, total)
    report["samples"] = total
    report["labelled"] = bool(labels) and NO_LABEL not in labels
    report["per_class"] = {str(label): labels[label] for label in sorted(labels) if label != NO_LABEL}
    report["duplicate_keys"] = sorted(key for key, count in keys.items() if count > 1)
    problems += _label_problems(labels, report["classes"])
    problems += [f"the key {key!r} stands {keys[key]} times" for key in report["duplicate_keys"]]
    if tree and "shards" in tree and sum(shard["samples"] for shard in tree["shards"]) != total and not problems:
        problems.append(f"the index has {sum(s['samples'] for s in tree['shards'])} samples, the shards {total}")
    if latents is not None and statistics[0]:
        report["format"] = latents.to_json()
        _add_statistics(report, latents, statistics)
    return {**report, "problems": problems}


def _index_tree(path: Path) -> dict[str, Any]:
    """``index.json`` as it is; empty if there is none or it cannot be read, which `load_index` reports."""
    try:
        tree = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _problem(shard: Path, tree: dict[str, Any]) -> list[str]:
    expected = tree.get("sha256", {}).get(shard.name)
    if tree and expected is None:
        return [f"shard {shard.name} is not in {INDEX}"]
    try:
        found = sha256_of(shard)
    except OSError as error:
        return [f"shard {shard.name} cannot be read: {error.strerror}"]
    if expected not in (None, found):
        return [
            f"shard {shard.name} has the sha256 {found[:12]}..., but {INDEX} says {expected[:12]}...: it was changed"
        ]
    return []


def _decode(dataset: ShardDataset, indices: range, statistics: np.ndarray) -> list[str]:
    """What is wrong with these samples; adds to (number of values, sum of means, sum of second moments)."""
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
            halves = dataset.read_halves(indices, [mirror] * len(indices))
        except DataError as error:
            return [str(error)]
        moments = dataset.latents.decode(halves).astype(np.float64)
        finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
        problems += [f"{dataset.describe(indices[int(row)])} is not finite" for row in np.flatnonzero(~finite)]
        mean, log_variance = moments[finite, 0], moments[finite, 1]
        statistics += mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()
    return problems


def _label_problems(labels: Counter, classes: list[str] | None) -> list[str]:
    problems = []
    if NO_LABEL in labels and len(labels) > 1:
        problems.append(f"{labels[NO_LABEL]} samples have no label, the others have")
    highest = max(labels, default=NO_LABEL)
    if classes is not None and highest >= len(classes):
        problems.append(f"the label {highest} has no name: there are {len(classes)} classes")
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
