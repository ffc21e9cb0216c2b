"""The computed shuffle: a permutation at any size, the same forever, and as random as it looks.

Seeds are fixed, so every statistic below is a constant; bounds are five standard deviations of random permutations.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.data.feistel import ROUNDS, permute
from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.shuffle import FeistelShuffle
from diffmoe_ds.data.sources.shards import Sample
from diffmoe_ds.rng import Purpose, TrainingDraws, philox

LARGEST_Z = 5


def permutations(n: int, epochs: int, seed: int = 1) -> np.ndarray:
    """The permutations of several epochs: int64 [epochs, n]."""
    keys = [philox(seed, Purpose.FEISTEL_SHUFFLE, epoch).random_raw(ROUNDS) for epoch in range(epochs)]
    return permute(np.broadcast_to(np.arange(n, dtype=np.uint64), (epochs, n)), n, np.stack(keys, 1)[:, :, None])


def assert_uniform(counts: np.ndarray) -> None:
    """Check by chi-square that values which should be equally likely were drawn equally often."""
    expected, freedom = counts.mean(), counts.size - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < LARGEST_Z * math.sqrt(2 * freedom)


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), n=st.integers(1, 2000))
def test_every_epoch_is_a_pure_permutation(seed, epoch, n):
    shuffle = FeistelShuffle(seed, n)
    read = [shuffle(epoch * n + index) for index in range(n)]
    assert sorted(read) == list(range(n))
    assert [FeistelShuffle(seed, n)(epoch * n + index) for index in reversed(range(n))] == read[::-1], "stateless"


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 60_000, 2**16, 2**16 + 1])
def test_every_image_is_read_once_an_epoch(n):
    assert (np.sort(permutations(n, 3)) == np.arange(n)).all()


class Numbers:
    """A dataset of 1x1 images whose labels are their numbers."""

    def __init__(self, n: int) -> None:
        self.labels, self.latents = np.arange(n), None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.zeros((1, 1, 1), np.uint8), index, str(index))

    def prefetch(self, shards) -> None:
        """Nothing to prefetch."""


def numbers_read(n: int, world: int, micro_batch: int, steps: int, start: int = 0) -> list[int]:
    """The images that all ranks read, in the order of their positions."""
    global_batch, found = world * micro_batch, {}
    draws = TrainingDraws(False, False, 0.0, np.zeros((1, 1, 1), np.float32))
    for rank in range(world):
        settings = LoaderSettings(
            seed=3, global_batch=global_batch, micro_batch=micro_batch, accumulation=1, rank=rank, world=world,
            image_shape=(1, 1, 1), num_classes=n, start_position=start, shuffle="feistel",
        )  # fmt: skip
        for _, batch in zip(range(steps), PositionLoader(Numbers(n), settings, lambda _: draws), strict=False):
            found.update(zip(batch.position.tolist(), batch.label.tolist(), strict=True))
    assert sorted(found) == list(range(start, start + steps * global_batch))
    return [found[position] for position in sorted(found)]


@pytest.mark.parametrize("world", range(1, 9))
@given(n=st.integers(1, 40), micro_batch=st.integers(1, 5), start=st.integers(0, 99))
@settings(max_examples=10)
def test_any_number_of_ranks_reads_every_image_once_an_epoch(world, n, micro_batch, start):
    steps = -(-(3 * n) // (world * micro_batch))
    read = numbers_read(n, world, micro_batch, steps, start)
    alone = FeistelShuffle(3, n)
    assert read == [alone(position) for position in range(start, start + len(read))]
    first = -start % n  # the first complete epoch
    assert sorted(read[first : first + n]) == list(range(n))


def test_a_shuffle_of_old_runs_can_be_resumed():
    """A release that changes these numbers cannot resume runs started before it."""
    small, large = FeistelShuffle(7, 10), FeistelShuffle(7, 10**9)
    assert [small(30 + index) for index in range(10)] == [7, 6, 9, 1, 5, 2, 4, 0, 8, 3]
    assert [large(10**9 * epoch + index) for epoch in (0, 5) for index in (0, 1, 10**9 - 1)] == [
        822143208,
        186225994,
        141471460,
        497405011,
        565954899,
        762482421,
    ]


BILLION = """
from pathlib import Path
from diffmoe_ds.data.shuffle import FeistelShuffle

def peak_kib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

before = peak_kib()
shuffle = FeistelShuffle(0, 10**9)
read = {shuffle(position) for position in range(0, 10**9, 10**6 + 3)}
assert len(read) == 1000 and max(read) > 0.99e9, read
print(peak_kib() - before)
"""


def test_the_order_of_a_billion_images_takes_no_memory():
    finished = subprocess.run([sys.executable, "-c", BILLION], capture_output=True, text=True, timeout=120, check=True)
    assert int(finished.stdout) < 5_000


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_a_few_images_are_equally_likely(n):
    numbers = (permutations(n, 20_000) * n ** np.arange(n)).sum(1)
    counts = np.unique(numbers, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert_uniform(counts)


@pytest.mark.parametrize(("n", "epochs"), [(10, 20_000), (100, 3000), (1000, 300), (60_000, 10)])
def test_an_image_is_read_anywhere_in_an_epoch(n, epochs):
    read, bins = permutations(n, epochs), min(n, 100)
    index = np.broadcast_to(np.arange(n) * bins // n, read.shape)
    assert_uniform(np.bincount((index * bins + read * bins // n).ravel(), minlength=bins * bins))
    displacement = np.abs(read - np.arange(n)).mean(1) / n
    expected = (1 - 1 / n**2) / 3
    assert abs(displacement.mean() - expected) < LARGEST_Z * displacement.std() / math.sqrt(epochs)


@pytest.mark.parametrize(("n", "epochs"), [(11, 40_000), (101, 8000), (1001, 1000), (60_001, 10)])
def test_consecutive_images_are_unrelated(n, epochs):
    """Also at the distances at which the two digits of an index repeat."""
    read, side, bins = permutations(n, epochs), math.isqrt(n - 1) + 1, min(n - 1, 100)
    for lag in (1, 2, side - 1, side, side + 1):
        steps = (read[:, lag:] - read[:, :-lag]) % n - 1  # n - 1 steps are equally likely
        assert_uniform(np.bincount((steps * bins // (n - 1)).ravel(), minlength=bins))


def test_epochs_and_seeds_are_unrelated():
    read, other = permutations(1000, 500), permutations(1000, 500, seed=2)
    equal = (read[1:] == read[:-1]).sum(1)  # Poisson with mean 1
    assert abs(equal.mean() - 1) < LARGEST_Z / math.sqrt(500) and abs(equal.var() - 1) < 0.4
    assert abs((read == other).sum(1).mean() - 1) < LARGEST_Z / math.sqrt(500)
