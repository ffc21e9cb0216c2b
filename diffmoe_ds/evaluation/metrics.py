"""Metrics as functions of features, computed in fp64: Frechet distance, KID, Inception Score, precision and recall.

Features are plain tensors or `ShardedRows`, which are sharded over the ranks; every rank must then call the function,
and gets the same result. Legend: N, M rows, B rows of a block, F features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.evaluation.moments import Moments, moments_over_ranks
from diffmoe_ds.evaluation.sharded import BLOCK_ROWS, ShardedRows
from diffmoe_ds.rng import evaluation_stream

Rows: TypeAlias = Tensor | ShardedRows
Progress = Callable[[], object]

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
IS_SPLIT = 5000
"""Images per split of the Inception Score, as in ADM's evaluator."""
NEIGHBOURS = 3
"""k of precision and recall (Kynkäänniemi et al., arXiv 1904.06991)."""
GROUPS = 20
"""Number of subsamples for an interval; each leaves out a different group of images."""
ROUNDING = 1e-12
"""Squared distances below this, relative to the squared norms, are treated as rounding errors between equal rows."""

GROUP_STREAM, KID_STREAM = 0, 1  # index of the random stream of each use; KID uses those from KID_STREAM on


class KID(NamedTuple):
    """Kernel distance over subsets."""

    mean: float
    std: float
    """Standard deviation over the subsets, not that of the mean."""


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


def frechet_distance(mu1_F: Tensor, sigma1_FF: Tensor, mu2_F: Tensor, sigma2_FF: Tensor) -> float:
    """Return the Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Args:
        mu1_F: mean [F], any float dtype.
        sigma1_FF: covariance [F, F], symmetric and positive semidefinite; may be singular.
        mu2_F: the other mean.
        sigma2_FF: the other covariance.

    Returns:
        A number of at least 0; rounding errors below 0 are clipped. NaN if an argument is not finite.
    """
    return frechet_from_factor(mu1_F, factor(sigma1_FF), mu2_F, sigma2_FF)


def factor(sigma_FF: Tensor) -> Tensor:
    """Return A [F, R] in fp64 with A A^T = sigma, where R is the rank of sigma, by a pivoted Cholesky factorization.

    If sigma is not finite, A is NaN.
    """
    from scipy.linalg.lapack import dpstrf  # imported lazily; torch has no pivoted Cholesky factorization

    sigma_FF = sigma_FF.double().cpu()
    if not sigma_FF.isfinite().all():  # dpstrf would stop there, as at the rank
        return torch.full((len(sigma_FF), 1), math.nan, dtype=torch.float64)
    largest = float(sigma_FF.diagonal().max().clamp(min=0))
    tolerance = len(sigma_FF) * torch.finfo(torch.float64).eps * largest
    packed_FF, pivots_F, rank, _ = dpstrf(sigma_FF.numpy(), lower=1, tol=tolerance)
    factor_FR = torch.zeros(len(sigma_FF), rank, dtype=torch.float64)
    factor_FR[torch.from_numpy(pivots_F).long() - 1] = torch.from_numpy(packed_FF).tril()[:, :rank]
    return factor_FR


def frechet_from_factor(mu1_F: Tensor, factor1_FR: Tensor, mu2_F: Tensor, sigma2_FF: Tensor) -> float:
    """Return the Frechet distance, with A from `factor` for the first covariance.

    With S1 = A A^T and S2 = B B^T, the square roots of the eigenvalues of S1^1/2 S2 S1^1/2 are the singular values of
    A^T B. Computing eigenvalues first and roots afterwards would lose half of the digits.
    """
    mu1_F, mu2_F, factor2_FQ = mu1_F.double().cpu(), mu2_F.double().cpu(), factor(sigma2_FF)
    if not all(part.isfinite().all() for part in (mu1_F, factor1_FR, mu2_F, factor2_FQ)):
        return math.nan  # svdvals would fail
    cross_RQ = factor1_FR.T @ factor2_FQ
    roots = torch.linalg.svdvals(cross_RQ).sum() if cross_RQ.numel() else torch.zeros((), dtype=torch.float64)
    traces = factor1_FR.square().sum() + sigma2_FF.double().trace()
    return _at_least(0, float((mu1_F - mu2_F).square().sum() + traces - 2 * roots))


def group_of_rows(count: int, seed: int = 0) -> np.ndarray:
    """Assign rows to the groups of `leave_out_interval` at random.

    Args:
        count: N.
        seed: of the random assignment.

    Returns:
        int64 [N]: the group, from 0 to min(20, N) - 1; -1 for the remainder, which is never left out.
    """
    groups = min(GROUPS, count)
    size = count // groups
    assigned = np.full(count, -1, np.int64)
    shuffled = evaluation_stream(seed, GROUP_STREAM).permutation(count)
    assigned[shuffled[: groups * size]] = np.repeat(np.arange(groups), size)
    return assigned


def leave_out_interval(value: float, left_out: list[float], count: int) -> Interval:
    """Return the 95% interval for a metric from subsamples without replacement that omit disjoint groups of rows.

    A statistic of n rows has a variance of about s^2/n. If g rows are left out, only those rows contribute to the
    spread of the values: their variance over G disjoint groups is s^2 g/(n - g)^2. The spread is therefore scaled by
    (n - g)^2/(n g), the finite-population correction of the delete-a-group jackknife; with n = G g it is (G - 1)^2/G.
    Student's t with G - 1 degrees of freedom gives the width.

    Args:
        value: the metric of all n rows, used as the center because the subsamples' smaller size biases their values.
        left_out: the metric without each of G groups of `group_of_rows`, G at least 2.
        count: n.
    """
    from scipy.special import stdtrit  # imported lazily

    groups = len(left_out)
    size = count // groups
    variance = np.var(left_out, ddof=1) * (count - size) ** 2 / (count * size)
    half = float(stdtrit(groups - 1, 0.975)) * math.sqrt(variance)
    return Interval(value - half, value + half)


def frechet_interval(
    rows: Rows, mu_F: Tensor, factor_FR: Tensor, value: float, seed: int = 0, progress: Progress | None = None
) -> Interval | None:
    """Return the 95% interval of a Frechet distance over new sets of the same size, for a fixed reference.

    Args:
        rows: features of the evaluated images.
        mu_F: mean of the reference.
        factor_FR: `factor` of the reference's covariance.
        value: the Frechet distance of all images.
        seed: of the random groups.
        progress: called after each subsample.

    Returns:
        None for fewer than 3 images.
    """
    rows = _sharded(rows)
    if len(rows) < 3:
        return None
    group_N = group_of_rows(len(rows), seed)
    mine_N = torch.from_numpy(group_N[rows.start : rows.start + len(rows.local)])
    parts = [moments_over_ranks(rows.local[mine_N == group], rows.world) for group in range(-1, int(group_N.max()) + 1)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    distances = torch.zeros(len(parts) - 1, dtype=torch.float64)
    for group, part in enumerate(parts[1:]):
        if group % rows.world == rows.rank:  # the ranks share the subsamples
            rest = total.without(part)
            distances[group] = frechet_from_factor(mu_F, factor_FR, rest.mean_F, rest.covariance())
        if progress is not None:
            progress()
    interval = leave_out_interval(value, _sum_over_ranks(distances, rows.world).tolist(), len(rows))
    return Interval(_at_least(0, interval.low), interval.high)


def kid(
    samples: Rows, reference: Rows, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> KID:
    """Return the kernel distance (Bińkowski et al., arXiv 1801.01401): unbiased squared MMD, kernel (x.y/F + 1)^3.

    Args:
        samples: features [N, F].
        reference: features [M, F].
        subsets: pairs of subsets, drawn without replacement within a subset; one if each holds all rows of both sets.
        subset_size: rows of each subset, at most N and M.
        seed: of the random subsets.

    Returns:
        NaN if a feature is not finite.
    """
    from torchmetrics.image.kid import poly_mmd  # imported lazily: torchmetrics takes seconds

    samples, reference = _sharded(samples), _sharded(reference)
    if not _all_finite(samples, reference):
        return KID(math.nan, math.nan)
    size = min(subset_size, len(samples), len(reference))
    assert size >= 2, "KID needs two images of each set"
    subsets = 1 if size == len(samples) == len(reference) else subsets  # the values of others would differ by rounding
    values = torch.zeros(subsets, dtype=torch.float64)
    for index in range(subsets):
        draw = evaluation_stream(seed, KID_STREAM + index)
        chosen = [draw.choice(len(rows), size, replace=False) for rows in (reference, samples)]
        real_BF, fake_BF = (rows.take(which) for rows, which in zip((reference, samples), chosen, strict=True))
        if index % samples.world == samples.rank:  # the ranks share the subsets
            values[index] = poly_mmd(real_BF.double(), fake_BF.double())
    values = _sum_over_ranks(values, samples.world)
    return KID(float(values.mean()), float(values.std(unbiased=False)))


def inception_score(logits: Rows, split: int = IS_SPLIT, seed: int = 0) -> tuple[float, Interval | None]:
    """Return the Inception Score (Salimans et al., arXiv 1606.03498): mean over splits of exp(mean KL(p(y|x), p(y))).

    Args:
        logits: [N, K], in image order.
        split: images per split; the last may be shorter.
        seed: of the random groups.

    Returns:
        The score and its 95% interval; no interval for fewer than 3 images.
    """
    logits = _sharded(logits)
    group_N = group_of_rows(len(logits), seed)
    splits, groups = -(-len(logits) // split), int(group_N.max()) + 1
    # For each split and group: rows, sum of p log p, and sum of p.
    sums = torch.zeros(splits, groups + 1, 2 + logits.num_features, dtype=torch.float64)
    for first in range(0, len(logits.local), split):
        index = np.arange(first, min(first + split, len(logits.local))) + logits.start
        log_p_BK = logits.local[first : first + split].double().log_softmax(1)
        p_BK = log_p_BK.exp()
        entropy_B = (p_BK * log_p_BK).sum(1, keepdim=True)
        row = torch.cat([torch.ones_like(entropy_B), entropy_B, p_BK], 1)
        sums.index_put_((torch.from_numpy(index // split), torch.from_numpy(group_N[index])), row, accumulate=True)
    sums = _sum_over_ranks(sums, logits.world)
    total = sums.sum(1)
    score = _score(total)
    if len(logits) < 3:
        return score, None
    interval = leave_out_interval(score, [_score(total - sums[:, group]) for group in range(groups)], len(logits))
    return score, Interval(_at_least(1, interval.low), interval.high)


def precision_recall(
    samples: Rows, reference: Rows, neighbours: int = NEIGHBOURS, progress: Progress | None = None
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    Precision is the fraction of samples within the k-th-nearest-neighbor distance of any reference image; recall is the
    fraction of reference images within that of any sample.

    Args:
        samples: features [N, F].
        reference: features [M, F].
        neighbours: k.
        progress: called after each of many parts of the work.

    Returns:
        NaN if a feature is not finite, and for a fraction that needs radii in a set of k images or fewer.
    """
    samples, reference = _sharded(samples), _sharded(reference)
    if not _all_finite(samples, reference):  # no row would be within a distance of NaN
        return math.nan, math.nan

    advance = progress or (lambda: None)

    def fraction(rows: ShardedRows, of: ShardedRows) -> float:
        if len(of) <= neighbours:  # no image has a k-th neighbor
            return math.nan
        return _inside(rows, of, _squared_radii(of, neighbours, advance), advance)

    return fraction(samples, reference), fraction(reference, samples)


def proportion_interval(fraction: float, count: int) -> Interval:
    """Return Wilson's 95% interval for a fraction of independent images; it contains the fraction despite rounding.

    Args:
        fraction: in [0, 1].
        count: number of images.
    """
    z2 = 1.959964**2
    center = (fraction + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (fraction * (1 - fraction) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(min(fraction, max(0.0, center - half)), max(fraction, min(1.0, center + half)))


def total_moments(rows: Rows) -> Moments:
    """Return the moments of all rows of all ranks."""
    rows = _sharded(rows)
    return moments_over_ranks(rows.local, rows.world)


def _squared_radii(rows: ShardedRows, neighbours: int, progress: Progress) -> Tensor:
    """Return the squared distance of every row to its k-th nearest other row, [N] on every rank."""
    kept = neighbours + 1  # the nearest is the row itself
    nearest = [torch.full((len(part), kept), math.inf, dtype=torch.float64) for part in rows.local.split(BLOCK_ROWS)]
    for block in rows.blocks():
        for index, part_NF in enumerate(rows.local.split(BLOCK_ROWS)):
            found = torch.cat([nearest[index], _squared_distances(part_NF, block.rows_BF)], 1)
            nearest[index] = found.topk(kept, dim=1, largest=False).values
            progress()
    return rows.gathered(torch.cat(nearest)[:, -1])


def _inside(rows: ShardedRows, of: ShardedRows, radii_N: Tensor, progress: Progress) -> float:
    """Return the fraction of rows that are within the radius of any row of the other set."""
    inside = [torch.zeros(len(part), dtype=torch.bool) for part in rows.local.split(BLOCK_ROWS)]
    for start, block_BF in of.blocks():
        radii_B = radii_N[start : start + len(block_BF)]
        for index, part_NF in enumerate(rows.local.split(BLOCK_ROWS)):
            inside[index] |= (_squared_distances(part_NF, block_BF) <= radii_B).any(1)
            progress()
    return float(_sum_over_ranks(torch.cat(inside).sum().double().reshape(1), rows.world)) / len(rows)


def _squared_distances(a_NF: Tensor, b_BF: Tensor) -> Tensor:
    """Return squared Euclidean distances [N, B]; exactly 0 for equal rows."""
    a_NF, b_BF = a_NF.double(), b_BF.double()
    norms_NB = a_NF.square().sum(1)[:, None] + b_BF.square().sum(1)
    distances_NB = torch.addmm(norms_NB, a_NF, b_BF.T, alpha=-2)
    return distances_NB.masked_fill_(distances_NB < ROUNDING * norms_NB, 0)


def _score(sums: Tensor) -> float:
    """Return the Inception Score from the sums of each split [splits, 2 + K]."""
    sums = sums[sums[:, 0] > 0.5]
    counts, entropy, p = sums[:, 0], sums[:, 1], sums[:, 2:].clamp(min=0) / sums[:, :1]
    return float((entropy / counts - torch.xlogy(p, p).sum(1)).exp().mean())


def _at_least(bound: float, value: float) -> float:
    """Return the larger number; NaN stays NaN, whereas ``max(bound, value)`` is the bound."""
    return bound if value < bound else value


def _all_finite(*sets: ShardedRows) -> bool:
    """Return whether all rows of all ranks are finite."""
    wrong = torch.tensor([sum(int((~rows.local.isfinite()).sum()) for rows in sets)])
    return not _sum_over_ranks(wrong, sets[0].world).any()


def _sharded(rows: Rows) -> ShardedRows:
    return rows if isinstance(rows, ShardedRows) else ShardedRows(rows, world=1)


def _sum_over_ranks(values: Tensor, world: int) -> Tensor:
    if world == 1:
        return values
    return all_reduce(values.contiguous())
