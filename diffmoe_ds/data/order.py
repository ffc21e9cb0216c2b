"""The order of the images: a pure function of the seed and the epoch.

A *position* is the running number of an image in the whole run, from 0.  Position p reads image
``epoch_order(seed, p // n, n)[p % n]`` of the data set's n images, on whichever rank and at whatever batch size.
"""

import functools

import numpy as np

from diffmoe_ds.data.draws import Purpose, philox


@functools.lru_cache(maxsize=2)  # a micro-batch touches one epoch, or two where it straddles their border
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of ``range(n)`` in which ``epoch`` reads the images: int64 ``[n]``, read-only."""
    # Sorting the raw Philox words, because NumPy promises these for ever but not Generator.permutation's choices.
    order = np.argsort(philox(seed, Purpose.ORDER, epoch).random_raw(n), kind="stable")
    order.flags.writeable = False
    return order


def locate(position: int, n: int) -> tuple[int, int]:
    """The epoch of ``position`` and its index in that epoch, for ``n`` images."""
    return divmod(position, n)


def sample_index(seed: int, position: int, n: int) -> int:
    """Which of the ``n`` images ``position`` reads."""
    epoch, index_in_epoch = locate(position, n)
    return int(epoch_order(seed, epoch, n)[index_in_epoch])
