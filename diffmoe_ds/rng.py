"""All random numbers of training and sampling, each a pure function of a seed and one index.

They come from Philox, a counter-based generator: the seed is its key, and the purpose and the index are the two
high words of its 256-bit counter.  Streams with a different purpose or index are therefore disjoint, and a stream
can be opened anywhere in a run without replaying the numbers before it.
"""

import functools
import math
from enum import IntEnum
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Purpose(IntEnum):
    """The highest counter word.  Numbers never change their meaning, so that old runs can resume."""

    SHUFFLE = 0
    TRAINING = 1
    SAMPLING = 2
    SHARD_SHUFFLE = 3
    WINDOW_SHUFFLE = 4
    HELD_OUT = 5
    LABELS = 6
    EVALUATION = 8
    FEISTEL_SHUFFLE = 9
    CAPTIONS = 10


class TrainingDraws(NamedTuple):
    """The random draws of one training image."""

    flip: bool  # mirror the image left-right
    drop: bool  # drop the label, for classifier-free guidance
    time: float  # in [0, 1), exact in float32
    noise: np.ndarray  # float32 [C, H, W], standard normal
    posterior: np.ndarray | None = None  # float32 [C, H, W], standard normal: selects a latent of the VAE's posterior


def philox(seed: int, purpose: Purpose, index: int) -> np.random.Philox:
    """Return the bit generator of one stream, with 2^128 numbers, for `seed` and `index` in [0, 2^64)."""
    assert 0 <= seed < 2**64 and 0 <= index < 2**64, (seed, index)
    return np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([0, 0, index, int(purpose)], np.uint64)
    )


def training_draws(
    seed: int,
    position: int,
    shape: tuple[int, int, int],
    label_dropout: float,
    flip: bool = True,
    posterior: bool = False,
) -> TrainingDraws:
    """Draw the random numbers of one training image.

    They are always drawn in the same order, so changing `flip`, `posterior` or `label_dropout` does not change the
    others.

    Args:
        seed: seed of the run.
        position: position of the image in the run.
        shape: (C, H, W) of the noise.
        label_dropout: probability that the label is dropped.
        flip: allow mirroring.
        posterior: also draw noise for a VAE's posterior.
    """
    rng = np.random.Generator(philox(seed, Purpose.TRAINING, position))
    flip_uniform = rng.random()
    drop_uniform = rng.random()
    # Drawn in float32: a float64 just below 1 would round up to 1.0 when it is cast.
    time = float(rng.random(dtype=np.float32))
    noise = rng.standard_normal(shape, dtype=np.float32)
    latent = posterior_noise(rng.bit_generator, shape) if posterior else None
    return TrainingDraws(flip and flip_uniform < 0.5, drop_uniform < label_dropout, time, noise, latent)


def caption_choice(seed: int, position: int) -> float:
    """Draw which caption of an image to use, as a fraction from 0 (the first) to less than 1.

    The stream is separate from that of `training_draws`, so that captions change no other draw.

    Args:
        seed: seed of the run.
        position: position of the image in the run.
    """
    return np.random.Generator(philox(seed, Purpose.CAPTIONS, position)).random()


def held_out_draws(position: int, shape: tuple[int, int, int], strata: int, posterior: bool = False) -> TrainingDraws:
    """Draw the random numbers for one held-out image, the same for every model and seed; it is never mirrored.

    [0, 1) is divided into `strata` equal parts. In every block of `strata` consecutive positions, each image gets a
    time from a different part, assigned by a random permutation per block, so that a periodic order of the classes
    does not tie a class to a noise level.

    Args:
        position: position of the image among the evaluated images.
        shape: (C, H, W) of the noise.
        strata: number of parts.
        posterior: also draw noise for a VAE's posterior.
    """
    block, row = divmod(position, strata)
    stratum = np.random.Generator(philox(1, Purpose.HELD_OUT, block)).permutation(strata)[row]
    rng = np.random.Generator(philox(0, Purpose.HELD_OUT, position))
    # One of 2^16 midpoints: far enough from the ends of the part to stay inside after rounding to float32.
    offset = (rng.integers(2**16) + 0.5) / 2**16
    noise = rng.standard_normal(shape, dtype=np.float32)
    latent = posterior_noise(rng.bit_generator, shape) if posterior else None
    return TrainingDraws(flip=False, drop=False, time=float(stratum + offset) / strata, noise=noise, posterior=latent)


def posterior_noise(bits: np.random.BitGenerator, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw standard normal float32 noise for a VAE's posterior, five times as fast as `Generator.standard_normal`.

    Every value is one of 65,536 equally likely quantiles: the variance is 0.99998, and no value exceeds 4.3 standard
    deviations.  The posterior is so narrow that its fp16 rounding is coarser.  Diffusion noise is drawn exactly.
    """
    values = math.prod(shape)
    words = bits.random_raw(-(-values // 4)).astype("<u8").view("<u2")
    return np.take(_quantiles(), words[:values], mode="clip").reshape(shape)


@functools.cache
def _quantiles() -> np.ndarray:
    """Return the 65,536 mid-point quantiles of the normal distribution, float32."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)], np.float32)


def image_stream(image_seed: int) -> np.random.Generator:
    """Return the generator for all noise of one sampled image; it is disjoint from all training streams."""
    return np.random.Generator(philox(image_seed, Purpose.SAMPLING, 0))


def evaluation_stream(seed: int, index: int) -> np.random.Generator:
    """Return the generator for one random choice of an evaluation, such as a KID subset or an interval's groups."""
    return np.random.Generator(philox(seed, Purpose.EVALUATION, index))


def label_stream(image_seed: int) -> np.random.Generator:
    """Return the generator for the random label of one sampled image; it is disjoint from the image's noise."""
    return np.random.Generator(philox(image_seed, Purpose.LABELS, 0))
