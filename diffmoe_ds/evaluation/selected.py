"""Selected metrics without intervals, for repeated evaluation during training.

Legend: N, M images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor

from diffmoe_ds.evaluation import metrics


class ImageFeatures(NamedTuple):
    """Outputs of an extractor for a set of images, on the CPU."""

    features_NF: Tensor
    """fp32 [N, F]."""
    logits_NK: Tensor | None
    """fp32 [N, K], if the extractor has logits."""


def selected_metrics(
    names: Collection[str], samples: ImageFeatures, reference: ImageFeatures, progress: Callable[[], object]
) -> dict[str, float]:
    """Return metrics, named as in ``diffmoe evaluate --json``.

    Args:
        names: values of ``eval.metrics``; the Inception Score is omitted if there are no logits.
        samples: features of the generated images.
        reference: features of the real images.
        progress: called after each metric, and often during long ones.
    """
    result: dict[str, float] = {}
    if "frechet" in names:
        mine, other = (metrics.total_moments(images.features_NF) for images in (samples, reference))
        result["frechet"] = metrics.frechet_distance(mine.mean_F, mine.covariance(), other.mean_F, other.covariance())
        progress()
    if "kid" in names:
        result["kid"], result["kid_std"] = metrics.kid(samples.features_NF, reference.features_NF)
        progress()
    if "inception_score" in names and samples.logits_NK is not None:
        result["inception_score"], _ = metrics.inception_score(samples.logits_NK)
        progress()
    if "precision" in names or "recall" in names:
        precision, recall = metrics.precision_recall(samples.features_NF, reference.features_NF, progress=progress)
        result |= {name: value for name, value in (("precision", precision), ("recall", recall)) if name in names}
        progress()
    return result
