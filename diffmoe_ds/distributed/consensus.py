"""Agreement between ranks: one vote, one error message, one exit code.

A rank that raises alone leaves the others waiting in their next collective. So anything that a single rank can fail at
(read its images, write its part of a checkpoint, take the run lock) ends in a vote that carries the most severe error
of any rank. The rank that hit that error raises it; all others raise `AlreadyReportedError` with the same exit code and
print nothing, so the user reads one message, once.

Two transports carry the same encoding: `vote` and `agree` use one all-reduce and need the process group;
`diffmoe_ds.distributed.rendezvous.Rendezvous.raise_on_all_ranks` uses the rendezvous store and works before the group
exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_reduce, get_rank, get_world_size
from diffmoe_ds.errors import AlreadyReportedError, DiffMoEError, as_reported

T = TypeVar("T")

_RANKS = 1 << 16
"""Ranks that the encoding of an error can tell apart."""


def encode_error(error: DiffMoEError | None, rank: int) -> int:
    """Encode an error as a number, so that a maximum over ranks picks the one to report.

    Returns:
        0 for no error, otherwise the exit code above 16 bits of rank: the largest exit code wins, then the lowest rank.
        An exit code is at most 255, so fp32 represents the number exactly.
    """
    return 0 if error is None else error.exit_code * _RANKS + (_RANKS - 1 - rank)


def raise_agreed(winner: int, mine: DiffMoEError | None, rank: int) -> None:
    """Raise the error that the ranks agreed on.

    Args:
        winner: the maximum of `encode_error` over the ranks.
        mine: this rank's own error, if any.
        rank: this rank.

    Raises:
        DiffMoEError: this rank's error, if it is the one to report.
        AlreadyReportedError: the error to report is another rank's.
    """
    if winner == 0:
        return
    if mine is not None and winner == encode_error(mine, rank):
        mine.same_on_all_ranks = False  # reported here, even if this is not rank 0
        raise mine
    raise AlreadyReportedError(winner // _RANKS)


def vote(device: torch.device, error: DiffMoEError | None = None, *flags: bool) -> tuple[bool, ...]:
    """Agree on errors and flags, in one all-reduce. Every rank must call this.

    Args:
        device: device for the tensors of the collectives.
        error: this rank's error, if any.
        flags: this rank's answers to yes-or-no questions.

    Returns:
        For each flag, whether any rank set it.

    Raises:
        DiffMoEError: on all ranks, if any rank has an error; see `raise_agreed`.
    """
    rank = get_rank()
    ballot = torch.tensor([encode_error(error, rank), *flags], dtype=torch.int32, device=device)
    winner, *answers = all_reduce(ballot, "max").tolist()
    raise_agreed(winner, error, rank)
    return tuple(map(bool, answers))


class Agreement(NamedTuple):
    """The ranks' answers, the same on every rank."""

    winner: int
    """For `raise_agreed`: the most severe error of any rank, encoded; 0 for none."""
    flags: tuple[bool, ...]
    """For each flag, whether any rank set it."""
    means: list[float]
    """For each value, its mean over the ranks."""
    attachments_WX: Tensor
    """int32: the attachment of every rank, on the device."""


def agree(
    values_N: Tensor, error: DiffMoEError | None, flags: tuple[bool, ...], attachment_X: Tensor | None = None
) -> Agreement:
    """Agree on errors, flags and mean values, in one all-reduce and one copy to the host. Every rank must call this.

    Args:
        values_N: fp32, on the device of the collectives.
        error: this rank's error, if any.
        flags: this rank's answers to yes-or-no questions.
        attachment_X: int32 numbers that every rank gets from every other, on the same device; the same length on all.
    """
    rank, device = get_rank(), values_N.device
    ballot = torch.tensor([encode_error(error, rank), *flags], dtype=torch.float32, pin_memory=device.type == "cuda")
    ballot = ballot.to(device, non_blocking=True)
    ours = torch.cat([ballot, values_N]).view(torch.int32)  # as integers, any bits survive the sum with zeros
    ours = ours if attachment_X is None else torch.cat([ours, attachment_X])
    every_WX = ours.new_zeros(get_world_size(), len(ours))
    every_WX[rank] = ours
    all_reduce(every_WX)
    end = len(ballot) + len(values_N)
    numbers_WN = every_WX[:, :end].view(torch.float32)
    answers = torch.cat([numbers_WN[:, : len(ballot)].amax(0), numbers_WN[:, len(ballot) :].mean(0)]).tolist()
    winner, *raised = answers[: len(ballot)]
    return Agreement(int(winner), tuple(map(bool, raised)), answers[len(ballot) :], every_WX[:, end:])


def raise_on_all_ranks(device: torch.device, action: Callable[[], T]) -> T:
    """Run an action that may fail on a single rank; if it fails on any, all ranks raise. Every rank must call this.

    Args:
        device: device for the tensors of the collectives.
        action: may raise a `DiffMoEError`, or an `OSError` about a file.

    Returns:
        What the action returns on this rank.

    Raises:
        DiffMoEError: on all ranks, if the action of any failed; see `raise_agreed`.
    """
    failure = None
    try:
        result = action()
    except (DiffMoEError, OSError) as error:
        failure = as_reported(error)
    vote(device, failure)
    return result
