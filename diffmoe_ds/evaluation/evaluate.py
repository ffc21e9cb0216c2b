"""Compare images with a reference: extract features in one pass over each set of images, then compute every metric.

Each rank computes and keeps the features of a contiguous share of the images. Every rank must call these functions,
and gets the same results. Legend: N images, B images of a batch, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffmoe_ds.distributed import consensus
from diffmoe_ds.distributed.collectives import all_gather, all_reduce
from diffmoe_ds.errors import ConfigError, NonFiniteError
from diffmoe_ds.evaluation import metrics
from diffmoe_ds.evaluation.extractors import Extractor, count_features
from diffmoe_ds.evaluation.metrics import Interval, Progress
from diffmoe_ds.evaluation.reference import Gaussian
from diffmoe_ds.evaluation.sharded import ShardedRows

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """The ranks that evaluate together."""

    rank: int = 0
    """This process's rank."""
    world: int = 1
    """Number of ranks; with more than one, a process group on CPUs is required."""

    def share(self, count: int, together: int = 1) -> range:
        """Return this rank's contiguous share of the images, in rank order.

        Args:
            count: number of images over all ranks.
            together: number of consecutive images that must not be split over ranks.
        """
        units = -(-count // together)
        first, end = (rank * units // self.world * together for rank in (self.rank, self.rank + 1))
        return range(min(first, count), min(end, count))

    def agree(self, action: Callable[[], T]) -> T:
        """Run an action that may fail on one rank; if it fails on any, all raise. Every rank must call this."""
        return action() if self.world == 1 else consensus.raise_on_all_ranks(CPU, action)

    def repeat(self, action: Callable[[], bool]) -> None:
        """Repeat an action until it returns False on every rank; errors as in `agree`. Every rank must call this."""
        while self.any(self.agree(action)):
            pass

    def any(self, flag: bool) -> bool:
        """Return whether any rank sets a flag. Every rank must call this."""
        return consensus.vote(CPU, None, flag)[0] if self.world > 1 else flag

    def rows(self, local_NF: Tensor) -> ShardedRows:
        """Return the rows of all ranks."""
        return ShardedRows(local_NF, self.world)


class FeatureSet(NamedTuple):
    """Outputs of an extractor for a set of images."""

    pooled: ShardedRows
    spatial: ShardedRows | None = None
    logits: ShardedRows | None = None


class ReferenceSet(NamedTuple):
    """The reference of the metrics."""

    pooled: Gaussian
    spatial: Gaussian | None
    features: ShardedRows | None
    """Required for KID, precision and recall."""
    num_images: int | None
    """N, if known."""


def check_features(extractor: Extractor, size: tuple[int, int], team: Team) -> None:
    """Try the extractor on every rank before any work. Every rank must call this.

    Args:
        extractor: the network.
        size: height and width of the images.
        team: the ranks.

    Raises:
        ConfigError: on all ranks, if it fails on any, or returns different numbers of features on different ranks.
    """
    width = team.agree(lambda: count_features(extractor, size))
    widths = [int(other) for other in all_gather(torch.tensor(width))] if team.world > 1 else [width]
    for rank, other in enumerate(widths):
        if other != widths[0]:
            raise ConfigError(
                f"--extractor {extractor.name}: returned {widths[0]} features per image on rank 0, but {other} on "
                f"rank {rank}."
            )


def extract_features(
    extractor: Extractor,
    batches: Iterator[Tensor],
    team: Team,
    progress: Callable[[int], object],
    *,
    classify: bool = True,
) -> FeatureSet:
    """Extract the features of this rank's images.

    Args:
        extractor: the network.
        batches: this rank's images, uint8 [B, C, H, W]; may be empty.
        team: the ranks.
        progress: called with the number of images in each batch.
        classify: also keep the logits.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot read an image or a feature is not finite.
    """
    parts: tuple[list[Tensor], ...] = ([], [], [])

    def step() -> bool:
        batch_BCHW = next(batches, None)
        if batch_BCHW is None:
            return False
        outputs = extractor.extract(batch_BCHW)
        if not outputs.features_BF.isfinite().all():
            raise NonFiniteError(f"{extractor.name}: the features of an image contain NaN or Inf.")
        kept = (outputs.features_BF, outputs.spatial_BS, outputs.logits_BK if classify else None)
        for held, part in zip(parts, kept, strict=True):
            if part is not None:
                held.append(part.float().cpu())
        progress(len(batch_BCHW))
        return True

    team.repeat(step)
    widths = torch.tensor([part[0].shape[1] if part else 0 for part in parts])
    if team.world > 1:
        all_reduce(widths, "max")  # a rank without images has no widths
    pooled, spatial, logits = (
        team.rows(torch.cat(part) if part else torch.empty(0, width)) if width else None
        for part, width in zip(parts, widths.tolist(), strict=True)
    )
    assert pooled is not None, "there are at least two images, with at least one feature"
    return FeatureSet(pooled, spatial, logits)


def gaussian_of(rows: ShardedRows) -> Gaussian:
    """Return the mean and covariance of the rows of all ranks."""
    moments = metrics.total_moments(rows)
    return Gaussian(moments.mean_F, moments.covariance())


def compute_metrics(
    samples: FeatureSet, reference: ReferenceSet, extractor: Extractor, progress: Progress | None = None
) -> dict[str, Any]:
    """Return every metric under the names of ``diffmoe evaluate --json``.

    Args:
        samples: features of the evaluated images.
        reference: statistics and features of the reference.
        extractor: the network that computed the features.
        progress: called after each step; `steps_of` returns the number of steps.

    Returns:
        Numbers, lists of two numbers for intervals, and None for metrics that cannot be computed.
    """
    result: dict[str, Any] = {
        "extractor": extractor.name,
        "n": len(samples.pooled),
        "n_reference": reference.num_images,
    }
    value, interval = _frechet(samples.pooled, reference.pooled, progress)
    result |= {"frechet": value, "frechet_interval": interval}
    if extractor.is_inception:
        result |= {"fid": value}
    if samples.spatial is not None and reference.spatial is not None:
        value, interval = _frechet(samples.spatial, reference.spatial, progress)
        result |= {"sfid": value, "sfid_interval": interval}
    names = ("kid", "kid_std", "inception_score", "precision", "recall")
    result |= dict.fromkeys((*names, *(f"{name}_interval" for name in names[2:])))
    if samples.logits is not None:
        score, spread = metrics.inception_score(samples.logits)
        result |= {"inception_score": score, "inception_score_interval": _pair(spread)}
    if reference.features is not None:
        mean, std = metrics.kid(samples.pooled, reference.features)
        _advance(progress)
        precision, recall = metrics.precision_recall(samples.pooled, reference.features)
        _advance(progress)
        result |= {"kid": mean, "kid_std": std, "precision": precision, "recall": recall}
        result["precision_interval"] = _pair(metrics.proportion_interval(precision, len(samples.pooled)))
        result["recall_interval"] = _pair(metrics.proportion_interval(recall, len(reference.features)))
    return result


def steps_of(samples: FeatureSet, reference: ReferenceSet) -> int:
    """Return the number of times that `compute_metrics` calls ``progress``."""
    distances = 1 + (samples.spatial is not None and reference.spatial is not None)
    return distances * min(metrics.GROUPS, len(samples.pooled)) + 2 * (reference.features is not None)


def _frechet(rows: ShardedRows, of: Gaussian, progress: Progress | None) -> tuple[float, list[float] | None]:
    """Return a Frechet distance and its interval."""
    root_FR = metrics.factor(of.covariance_FF)
    mine = gaussian_of(rows)
    value = metrics.frechet_from_factor(of.mean_F, root_FR, mine.mean_F, mine.covariance_FF)
    return value, _pair(metrics.frechet_interval(rows, of.mean_F, root_FR, value, progress=progress))


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None or math.isnan(interval.low) else [interval.low, interval.high]


def _advance(progress: Progress | None) -> None:
    if progress is not None:
        progress()
