"""Iterate over the same number of items on all ranks, such as the batches of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

from tqdm import tqdm

from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import DiffMoEError
from diffmoe_ds.training.batches import as_data_error
from diffmoe_ds.training.setup import Run

T = TypeVar("T")


def lockstep(items: Iterator[T], total: int, what: str, run: Run, watchdog: Watchdog) -> Iterator[T]:
    """Yield items; if any rank cannot produce one, all ranks raise. Every rank must exhaust the iterator.

    Args:
        items: the same number on all ranks. Producing an item may call collectives, but not `raise_on_all_ranks`:
            the error would not be reported.
        total: number of items, for the progress bar, which rank 0 shows on a terminal.
        what: label of the bar.
        run: the run.
        watchdog: ticked after each item.
    """
    with tqdm(total=total, desc=what, unit="batch", leave=False, disable=None if run.is_main else True) as bar:
        while (item := raise_on_all_ranks(run.device, lambda: next(items, None))) is not None:
            yield item
            watchdog.tick()
            bar.update()


def num_batches(count: int, run: Run) -> int:
    """Return the number of micro-batches in a rank's equal share of images.

    Args:
        count: number of images over all ranks.
        run: the run.
    """
    return math.ceil(math.ceil(count / run.topology.world) / run.settings.micro_batch)


def reading(items: Iterator[T]) -> Iterator[T]:
    """Yield items read from files, converting any other error to `DataError`.

    Raises:
        DataError: an item cannot be read.
    """
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except DiffMoEError:
            raise
        except Exception as error:
            raise as_data_error(error) from error
        yield item
