"""The shuffle of the images and their random draws are pure functions that never change."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.data.shuffle import WindowShuffle, epoch_shuffle, locate, sample_index
from diffmoe_ds.rng import image_stream, training_draws
from tests.helpers.data import SHAPE


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), n=st.integers(1, 300))
def test_a_shuffle_is_a_pure_permutation(seed, epoch, n):
    shuffle = epoch_shuffle(seed, epoch, n)
    assert shuffle.dtype == np.int64 and sorted(shuffle.tolist()) == list(range(n))
    epoch_shuffle.cache_clear()
    assert (epoch_shuffle(seed, epoch, n) == shuffle).all()
    assert locate(epoch * n + n - 1, n) == (epoch, n - 1)
    assert sample_index(seed, epoch * n + n - 1, n) == shuffle[-1]


def test_every_epoch_has_every_image_once_in_a_new_order():
    epochs = [[sample_index(3, epoch * 50 + i, 50) for i in range(50)] for epoch in range(4)]
    assert all(sorted(shuffle) == list(range(50)) for shuffle in epochs)
    assert len({tuple(shuffle) for shuffle in epochs}) == 4
    assert not (epoch_shuffle(3, 0, 50) == epoch_shuffle(4, 0, 50)).all()


@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    window=st.integers(1, 30),
    epoch=st.integers(0, 3),
)
def test_a_window_reads_every_image_once_and_few_shards_at_a_time(seed, sizes, window, epoch):
    n, ends = sum(sizes), np.cumsum(sizes)
    shuffle = WindowShuffle(seed, sizes, window)
    read = [shuffle(epoch * n + i) for i in range(n)]
    assert sorted(read) == list(range(n))
    assert [WindowShuffle(seed, sizes, window)(epoch * n + i) for i in reversed(range(n))] == read[::-1], "stateless"
    shard_of = np.searchsorted(ends, read, side="right")
    left = np.array(sizes)
    for start in range(0, n, window):
        ahead = set(shuffle.next_shards(epoch * n + start - 1)) if start else None
        found = set(shard_of[start : start + window].tolist())
        assert ahead is None or ahead - {s for s in ahead if sizes[s] == 0} == found
        np.subtract.at(left, shard_of[start : start + window], 1)
        started = [s for s in range(len(sizes)) if 0 < left[s] < sizes[s]]
        assert len(started) <= 1, "only the shard that straddles the window's end is partially read"


def test_window_shuffles_of_old_runs_can_be_resumed():
    shuffle = WindowShuffle(7, [3, 4, 5], 5)
    assert [shuffle(36 + i) for i in range(12)] == [8, 1, 7, 2, 0, 4, 9, 11, 10, 3, 6, 5]


def test_old_runs_can_be_resumed():
    """A release that changes these numbers cannot resume runs started before it."""
    assert epoch_shuffle(7, 3, 10).tolist() == [2, 8, 9, 4, 0, 6, 7, 5, 1, 3]
    draws = training_draws(7, 12348, (1, 1, 3), 0.5)
    assert (draws.flip, draws.drop, draws.time) == (True, False, 0.31956297159194946)
    np.testing.assert_allclose(draws.noise.ravel(), [0.2853857, -0.04999052, 1.9049188], 1e-6)
    np.testing.assert_allclose(image_stream(7).standard_normal(3, np.float32), [-0.4836463, -2.018093, 0.6625088], 1e-6)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**63))
def test_switches_do_not_shift_the_other_draws(seed, position):
    on = training_draws(seed, position, SHAPE, label_dropout=1.0)
    off = training_draws(seed, position, SHAPE, label_dropout=0.0, flip=False)
    assert on.drop and not off.drop and not off.flip
    assert on.time == off.time and 0 <= on.time < 1 and np.float32(on.time) == on.time
    assert (on.noise == off.noise).all() and on.noise.dtype == np.float32 and on.noise.shape == SHAPE


def test_draws_have_their_distributions():
    draws = [training_draws(1, position, (1, 4, 4), 0.1) for position in range(4000)]
    noise = np.stack([d.noise for d in draws])
    assert abs(np.mean([d.flip for d in draws]) - 0.5) < 0.03
    assert abs(np.mean([d.drop for d in draws]) - 0.1) < 0.02
    assert abs(np.mean([d.time for d in draws]) - 0.5) < 0.02
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_streams_never_coincide():
    """Neighbouring seeds and positions share no noise, and sampling streams share no 64-bit word."""
    generators = [image_stream(seed).bit_generator for seed in range(4)]
    words = np.concatenate([generator.random_raw(1000) for generator in generators])
    noises = [training_draws(seed, position, SHAPE, 0.0).noise.ravel() for seed in range(4) for position in range(4)]
    noises += [image_stream(seed).standard_normal(64, np.float32) for seed in range(4)]
    assert len(np.unique(words)) == len(words)
    assert len({noise.tobytes() for noise in noises}) == len(noises)
