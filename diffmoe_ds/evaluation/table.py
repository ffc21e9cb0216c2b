"""Format metrics as lines of text, each with its spread, extractor and number of images, or as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

LABELS = {
    "frechet": "Frechet distance",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "class score",
    "precision": "precision",
    "recall": "recall",
}
"""Names of the metrics for any features; only a distance between Inception features is called FID."""
MODEL_LABELS = {"capacity": "experts per token", "validation_loss": "validation loss"}
"""Names of the results that need the model."""
INCEPTION_LABELS = {**LABELS, "frechet": "FID", "inception_score": "Inception Score"}


def metric_lines(result: dict[str, Any], is_inception: bool) -> Iterator[str]:
    """Yield the lines that ``diffmoe evaluate`` prints.

    Args:
        result: as printed by ``--json``.
        is_inception: whether the features are those of FID.
    """
    if "n_reference" in result:
        yield from _reference_lines(result, is_inception)
    if "retrieval_precision" in result:
        spread = f"top 5 {result['retrieval_top5']:.4g}"
        if result["retrieval_control"] is not None:
            spread = f"control {result['retrieval_control']:.4g}, {spread}"
        of = f"{result['retrieval_n']:,} of {result['n']:,} images against {result['retrieval_n_reference']:,} images"
        yield f"{'retrieval':<17} {result['retrieval_precision']:<9.5g}  {spread:<38}  {result['extractor']}, {of}"
    if "clip_score" in result:
        of = f"{result['clip_model']}, {result['n']:,} images"
        yield f"{'CLIP score':<17} {result['clip_score']:<9.5g}  {'':<38}  {of}"
    yield from model_lines(result)


def _reference_lines(result: dict[str, Any], is_inception: bool) -> Iterator[str]:
    """Yield the lines of the metrics that compare images with a reference."""
    reference = "statistics" if result["n_reference"] is None else f"{result['n_reference']:,} images"
    space = f"{result['extractor']}, {result['n']:,} images against {reference}"
    for name, label in (INCEPTION_LABELS if is_inception else LABELS).items():
        value = result.get(name)
        if value is None:
            continue
        interval = result.get(f"{name}_interval")
        if name == "kid":
            spread = f"standard deviation of subsets {result['kid_std']:.2g}"
        else:
            spread = "" if interval is None else f"95% interval {interval[0]:.4g} to {interval[1]:.4g}"
        yield f"{label:<17} {value:<9.5g}  {spread:<38}  {space}"


def model_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of those results that need the model."""
    for name, label in MODEL_LABELS.items():
        if result.get(name) is not None:
            of = f"{result['validation_images']:,} held-out images" if name == "validation_loss" else ""
            yield f"{label:<17} {result[name]:<9.5g}  {of}".rstrip()


def finite_or_none(value: Any) -> Any:
    """Return a value that is valid in strict JSON, with None for non-finite numbers."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
