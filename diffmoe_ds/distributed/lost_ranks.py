"""Report the death of another rank in one sentence, for commands without a watchdog."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffmoe_ds.distributed.launch import resolve_launch
from diffmoe_ds.errors import RankLostError

LOST = ("by peer", "Broken pipe", "remote process exited")
"""Parts of the error messages of gloo and NCCL when the connection to another rank is lost."""


@contextmanager
def reporting_lost_ranks(advice: str) -> Iterator[None]:
    """Within the context, report it in one sentence if a collective fails because another rank is gone.

    Args:
        advice: how to go on; ends the sentence.

    Raises:
        RankLostError: another rank died.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST):
            raise
        lost = RankLostError(f"another rank died; {advice}.")
        lost.same_on_all_ranks = resolve_launch().rank != 1  # rank 1 reports it too: rank 0 may be the dead one
        raise lost from error
