"""Every random number of training and sampling, each a pure function of a seed and one index.

All come from Philox, a counter-based generator: the seed is its key, and the purpose and the index are the two
high words of its 256-bit counter.  Streams of different purpose or index are therefore disjoint, and a stream
can be opened anywhere in a run without replaying what came before.
"""

import functools
import math
from enum import IntEnum
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Purpose(IntEnum):
    """The highest counter word; a number once given keeps its meaning, or old runs could not be continued."""

    SHUFFLE = 0
    TRAINING = 1
    SAMPLING = 2
    SHARD_SHUFFLE = 3
    WINDOW_SHUFFLE = 4


class TrainingDraws(NamedTuple):
    """What chance decides about one image of the run."""

    flip: bool  # mirror the image left-right
    drop: bool  # drop the label, for classifier-free guidance
    time: float  # in [0, 1), exact in float32
    noise: np.ndarray  # float32 [C, H, W], standard normal
    posterior: np.ndarray | None = None  # float32 [C, H, W], standard normal: which latent of its VAE's posterior


def philox(seed: int, purpose: Purpose, index: int) -> np.random.Philox:
    """The bit generator of one stream: 2^128 numbers of its own, for ``seed`` and ``index`` in 0..2^64-1."""
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
    """The draws of the image at ``position`` of the run, with noise of ``shape`` (C, H, W).

    The numbers are always drawn in the same order, so switching ``flip`` or ``posterior`` off or changing
    ``label_dropout`` (a probability) leaves all the others as they were.
    """
    rng = np.random.Generator(philox(seed, Purpose.TRAINING, position))
    flip_uniform = rng.random()
    drop_uniform = rng.random()
    # Drawn in float32: a float64 just below 1 would round up to 1.0 when it is cast.
    time = float(rng.random(dtype=np.float32))
    noise = rng.standard_normal(shape, dtype=np.float32)
    latent = posterior_noise(rng.bit_generator, shape) if posterior else None
    return TrainingDraws(flip and flip_uniform < 0.5, drop_uniform < label_dropout, time, noise, latent)


def posterior_noise(bits: np.random.BitGenerator, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard normal float32 noise for a VAE's posterior, in a fifth of the time that the exact kind takes.

    Every value is one of 65,536 equally likely quantiles: variance 0.99998, nothing beyond 4.3 deviations.  The
    posterior is so narrow that its own fp16 rounding is coarser; the noise of the diffusion is drawn exactly.
    """
    values = math.prod(shape)
    words = bits.random_raw(-(-values // 4)).astype("<u8").view("<u2")
    return np.take(_quantiles(), words[:values], mode="clip").reshape(shape)


@functools.cache
def _quantiles() -> np.ndarray:
    """The normal distribution's quantiles at the middle of each 65,536th, float32."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)], np.float32)


def image_stream(image_seed: int) -> np.random.Generator:
    """The generator of all noise of one *sampled* image; it shares nothing with any training stream."""
    return np.random.Generator(philox(image_seed, Purpose.SAMPLING, 0))
