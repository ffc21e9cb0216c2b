"""Metrics against independent computations: scipy's matrix square root, brute force, closed forms, simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from diffmoe_ds.evaluation import metrics
from diffmoe_ds.evaluation.moments import Moments


def normal(rows: int, features: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale + shift


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    found = Moments(rows.shape[1]).add(rows)
    return found.mean_F, found.covariance()


def test_moments_do_not_depend_on_the_batches():
    rows = normal(101, 7, 0, shift=1e4)
    whole = Moments(7).add(rows)
    parts = Moments(7)
    for part in rows.float().double().split(13):
        parts.add(part)
    parts.add(rows[:0])
    torch.testing.assert_close(whole.covariance(), torch.from_numpy(np.cov(rows.numpy(), rowvar=False)))
    first, rest = Moments(7).add(rows[:40]), Moments(7).add(rows[40:])
    for same in (first.merged(rest), whole.merged(Moments(7))):
        torch.testing.assert_close(same.covariance(), whole.covariance(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.without(first).covariance(), rest.covariance(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole.without(first).mean_F, rest.mean_F, rtol=1e-12, atol=0)


def test_frechet_distance_is_the_published_formula():
    x, y = normal(300, 24, 1, 2.0), normal(400, 24, 2, shift=0.3) @ normal(24, 24, 3)
    (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy()).real
    expected = float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()) - 2 * np.trace(root)
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-9)
    # for Gaussians with diagonal covariances it has a closed form
    a, b = torch.arange(1.0, 6), torch.arange(5.0, 0, -1)
    assert metrics.frechet_distance(a, a.diag(), b, b.diag()) == pytest.approx(
        float((a - b).square().sum() + (a.double().sqrt() - b.double().sqrt()).square().sum()), rel=1e-12
    )


@pytest.mark.parametrize("rows", (2, 5, 40))
def test_a_degenerate_covariance_gives_a_number(rows):
    """Fewer images than features, constant features, and no variance at all."""
    x, y = normal(rows, 32, 4), normal(3 * rows, 32, 5, 3.0)
    x[:, :8] = y[:, :4] = 0.5
    (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
    scale = float(sigma1.trace() + sigma2.trace())
    assert metrics.frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-10 * scale)
    distance = metrics.frechet_distance(mu1, sigma1, mu2, sigma2)
    roots = np.sqrt(np.maximum(np.linalg.eigvals((sigma1 @ sigma2).numpy()).real, 0)).sum()
    assert distance == pytest.approx(float((mu1 - mu2).square().sum()) + scale - 2 * roots, rel=1e-5)
    nothing = torch.zeros_like(sigma1)
    expected = float((mu1 - mu2).square().sum() + sigma2.trace())
    assert metrics.frechet_distance(mu1, nothing, mu2, sigma2) == pytest.approx(expected, rel=1e-12)
    assert metrics.frechet_distance(mu2, sigma2, mu1, nothing) == pytest.approx(expected, rel=1e-12)


def test_a_set_against_itself_is_0_however_its_variances_decay():
    scale_F = torch.logspace(0, -9, 64, dtype=torch.float64)
    rows_NF = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale_F
    moments = metrics.total_moments(rows_NF)
    same = (moments.mean_F, moments.covariance())
    assert metrics.frechet_distance(*same, *same) < 1e-12


def test_intervals_cover_the_mean_over_new_sets():
    """On simulated sets, about 95% of the intervals cover the mean distance; their width matches its spread."""
    rows, features, sets = 300, 6, 120
    reference = torch.zeros(features), metrics.factor(torch.eye(features))
    distances, intervals = [], []
    for seed in range(sets):
        x = normal(rows, features, 1000 + seed, 1.2, 0.3)
        distances.append(metrics.frechet_from_factor(*reference, *moments(x)))
        intervals.append(metrics.frechet_interval(x, *reference, distances[-1], seed))
    low, high = np.array(intervals).T
    covered = np.mean((low <= np.mean(distances)) & (np.mean(distances) <= high))
    assert 0.88 <= covered <= 1, covered
    deviation = np.mean(high - low) / 2 / scipy.stats.t.ppf(0.975, metrics.GROUPS - 1)
    assert deviation == pytest.approx(np.std(distances), rel=0.25)
    assert (low < distances).all() and (distances < high).all()


def test_groups_are_disjoint_and_equal():
    group = metrics.group_of_rows(107)
    sizes = np.bincount(group + 1, minlength=21)
    assert sizes.tolist() == [7] + [5] * 20
    assert (group != metrics.group_of_rows(107, seed=1)).any()
    assert sorted(metrics.group_of_rows(3)) == [0, 1, 2]
    assert metrics.frechet_interval(normal(2, 3, 0), torch.zeros(3), metrics.factor(torch.eye(3)), 1.0) is None


def test_kid_is_the_unbiased_estimate():
    """With subsets as large as the sets, every subset is the same: compare with the definition, pair by pair."""
    x, y = normal(12, 5, 6), normal(12, 5, 7, shift=0.4)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    same = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / (12 * 11)
    expected = same - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 12**2
    found = metrics.kid(x, y, subsets=3)
    assert found.mean == pytest.approx(expected, rel=1e-10) and found.std == 0
    assert metrics.kid(1e3 * normal(500, 5, 6), 1e3 * normal(500, 5, 7)).std == 0, "not even rounding"
    x, y = normal(60, 5, 8), normal(80, 5, 9, shift=0.4)
    found = metrics.kid(x, y, subsets=200, subset_size=20)
    assert found.mean == pytest.approx(metrics.kid(x, y, subsets=1).mean, rel=0.3) and found.std > 0
    assert found == metrics.kid(x, y, subsets=200, subset_size=20)
    assert found != metrics.kid(x, y, subsets=200, subset_size=20, seed=1)


def brute_force(samples: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall by their definition, image by image."""
    samples, reference = samples.numpy(), reference.numpy()

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        inside = 0
        for point in points:
            for center in range(len(manifold)):
                others = np.delete(manifold, center, axis=0)
                radius = np.sort(np.linalg.norm(others - manifold[center], axis=1))[k - 1]
                if np.linalg.norm(point - manifold[center]) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", (1, 3))
def test_precision_and_recall_equal_brute_force(k, monkeypatch):
    samples, reference = normal(50, 3, 10, 0.6, 0.8), normal(70, 3, 11)
    expected = brute_force(samples, reference, k)
    assert 0.1 < expected[0] < 1 and 0.1 < expected[1] < 1
    assert metrics.precision_recall(samples, reference, k) == expected
    for module in ("sharded", "metrics"):
        monkeypatch.setattr(f"diffmoe_ds.evaluation.{module}.BLOCK_ROWS", 16)
    assert metrics.precision_recall(samples, reference, k) == expected
    assert metrics.precision_recall(samples, samples, k) == (1, 1)
    assert metrics.precision_recall(samples, reference + 100, k) == (0, 0)


def test_radii_need_a_kth_neighbor():
    three, four = normal(3, 5, 21), normal(4, 5, 22)
    precision, recall = metrics.precision_recall(three, four)
    assert 0 < precision == metrics.precision_recall(torch.cat([three, three]), four)[0] and np.isnan(recall)
    assert np.isnan(metrics.precision_recall(four, three)[0]) and metrics.precision_recall(four, three)[1] == precision
    assert metrics.precision_recall(three, four, 2) == brute_force(three, four, 2)


def test_precision_and_recall_of_repeated_images():
    """The radius around an image with three copies is 0, and only the same image is within it."""
    copies, other = normal(1, 40, 12, 30).repeat(5, 1), normal(5, 40, 13, 30)
    assert metrics.precision_recall(copies, copies) == (1, 1)
    assert metrics.precision_recall(other, copies)[0] == 0


def test_inception_score_is_that_of_adm():
    logits = normal(90, 11, 14, 3.0)
    scores = []
    for part in logits.softmax(1).numpy()[:40], logits.softmax(1).numpy()[40:80], logits.softmax(1).numpy()[80:]:
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0, keepdims=True))), 1))))
    score, interval = metrics.inception_score(logits, split=40)
    assert score == pytest.approx(np.mean(scores), rel=1e-12)
    assert interval is not None and 1 <= interval.low < score < interval.high
    same = torch.zeros(10, 4)
    assert metrics.inception_score(same)[0] == pytest.approx(1)
    assert metrics.inception_score(torch.eye(4).repeat(5, 1) * 1e4)[0] == pytest.approx(4)


def test_proportions_have_wilson_intervals():
    assert metrics.proportion_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert metrics.proportion_interval(1.0, 60) == pytest.approx((0.93983, 1), abs=1e-5)
    assert metrics.proportion_interval(0.0, 60).low == 0
    assert metrics.proportion_interval(1.0, 98).high == 1, "not below 1 by rounding"


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_feature_that_is_not_finite_gives_no_number(value):
    """In particular not 0, the best Frechet distance."""
    x, y = normal(40, 5, 15), normal(50, 5, 16)
    x[7, 2] = value
    for pair in ((x, y), (y, x), (x, x)):
        (mu1, sigma1), (mu2, sigma2) = map(moments, pair)
        assert np.isnan(metrics.frechet_distance(mu1, sigma1, mu2, sigma2))
        assert np.isnan(metrics.kid(*pair, subset_size=2)).all() and np.isnan(metrics.precision_recall(*pair)).all()
    mu, sigma = moments(y)
    assert np.isnan(metrics.frechet_interval(x, mu, metrics.factor(sigma), torch.nan)).all()
    score, interval = metrics.inception_score(x)
    assert np.isnan([score, *interval]).all() and np.isnan(metrics.proportion_interval(torch.nan, 9)).all()
