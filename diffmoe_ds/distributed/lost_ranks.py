"""Name a rank that dies or hangs, for commands that do not train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.distributed.watchdog import Watchdog

SILENT_S = 300.0
"""Seconds that a rank may not respond; if it died in a collective, the others notice within seconds."""
STUCK_S = 1750.0
"""Seconds that ranks wait for one that responds: long, because it may generate a batch or assemble all images, but less
than the half hour after which torch's collectives fail."""


@contextmanager
def naming_lost_ranks(rendezvous: Rendezvous) -> Iterator[None]:
    """Within the context, a rank that dies or hangs ends the others, which name it. Every rank must enter it.

    Args:
        rendezvous: the ranks.

    Raises:
        RankLostError: another rank died.
    """
    launch = rendezvous.launch
    watchdog = Watchdog(
        launch.rank, launch.world, SILENT_S, rendezvous.hosts, rendezvous.store, STUCK_S, trains=False
    )  # fmt: skip
    with watchdog, watchdog.watching():
        yield
