"""Ranks that fail together: one vote, one message, one exit code.

A rank that raises alone leaves the others waiting in their next collective.  So whatever one rank can fail at alone
(read its images, write its part of a checkpoint, hold the run lock) ends in a vote: a single all-reduce that carries
the most severe error of any rank.  The rank that met the error raises it; all others raise `AlreadyReportedError`
with the same exit code and stay silent, so the user reads one sentence, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from diffmoe_ds.distributed.collectives import WAITING
from diffmoe_ds.errors import AlreadyReportedError, DiffMoEError

T = TypeVar("T")

_RANKS = 1 << 16
"""Ranks that the encoding of an error can tell apart."""


def encode_error(error: DiffMoEError | None, rank: int) -> int:
    """Return an error as a number that a maximum over ranks can merge.

    Returns:
        0 for no error, otherwise the exit code above 16 bits of rank: the largest exit code wins, then the lowest rank.
    """
    return 0 if error is None else error.exit_code * _RANKS + (_RANKS - 1 - rank)


def raise_agreed(winner: int, mine: DiffMoEError | None, rank: int) -> None:
    """Raise what the ranks agreed on.

    Args:
        winner: the maximum of `encode_error` over the ranks.
        mine: this rank's own error, if any.
        rank: this rank.

    Raises:
        DiffMoEError: this rank's error, if it is the one that is reported.
        AlreadyReportedError: the error of another rank is the one that is reported.
    """
    if winner == 0:
        return
    if mine is not None and winner == encode_error(mine, rank):
        raise mine
    raise AlreadyReportedError(winner // _RANKS)


def vote(device: torch.device, error: DiffMoEError | None = None, *flags: bool) -> tuple[bool, ...]:
    """Agree on errors and flags, in one all-reduce.  Every rank must call.

    Args:
        device: where the process group's tensors live.
        error: what this rank failed at.
        flags: this rank's answers to yes-or-no questions.

    Returns:
        For each flag, whether any rank set it.

    Raises:
        DiffMoEError: on all ranks, if any rank has an error; see `raise_agreed`.
    """
    rank = dist.get_rank()
    ballot = torch.tensor([encode_error(error, rank), *flags], dtype=torch.int32, device=device)
    with WAITING:
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
    winner, *answers = ballot.tolist()
    raise_agreed(winner, error, rank)
    return tuple(map(bool, answers))


def raise_on_all_ranks(device: torch.device, action: Callable[[], T]) -> T:
    """Do something that a single rank may fail at; if any fails, all raise.  Every rank must call.

    Args:
        device: where the process group's tensors live.
        action: may raise a `DiffMoEError`.

    Returns:
        What the action returns on this rank.

    Raises:
        DiffMoEError: on all ranks, if the action of any failed; see `raise_agreed`.
    """
    failure = None
    try:
        result = action()
    except DiffMoEError as error:
        failure = error
    vote(device, failure)
    return result
