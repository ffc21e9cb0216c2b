"""Exact top-k over a pool of tokens that may be spread over many ranks, without gathering scores.

The bits of a float, read as an integer, sort like the float. So the K-th largest score of each expert is found digit by
digit, most significant first (a radix search): count how many keys have each value of the digit, sum the counts over
the ranks, and keep the digit that contains the K-th key. Only a table of counts, [E, 2048], is sent, three times,
regardless of the number of tokens. Ties are broken by rank and, within a rank, by token index, so exactly K tokens are
selected: the result equals gathering all scores and sorting them with a stable sort.

Legend: T tokens of this rank, E experts, N values of a digit, K tokens that an expert takes from the whole pool.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of the digits of a 32-bit key, most significant first."""


class Pool(Protocol):
    """The ranks whose tokens compete."""

    size: int
    """Number of ranks."""

    def sum(self, counts: Tensor) -> Tensor:
        """Return the element-wise sum over the ranks; the same on every rank."""
        ...

    def sum_before(self, counts: Tensor) -> Tensor:
        """Return the element-wise sum over the ranks before this one; zeros on the first."""
        ...


class LocalPool:
    """The pool of a single rank, without communication."""

    size = 1

    def sum(self, counts: Tensor) -> Tensor:
        """Return ``counts`` itself."""
        return counts

    def sum_before(self, counts: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(counts)


def sort_keys(scores: Tensor) -> Tensor:
    """Return int64 keys in [0, 2^32) that sort like the fp32 ``scores``; -0.0 equals 0.0, NaN is above infinity."""
    bits = scores.detach().float().contiguous().view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    key = torch.where(bits >= 0, magnitude, -magnitude)  # both zeros become 0
    key = torch.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)
    return key + (1 << 31)


def key_values(keys: Tensor) -> Tensor:
    """Return the fp32 scores of keys, the inverse of `sort_keys`."""
    key = keys - (1 << 31)
    bits = torch.where(key >= 0, key, -key - (1 << 31))  # the sign bit as an int32
    return bits.to(torch.int32).view(torch.float32)


def kth_largest(keys_TE: Tensor, k_E: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Find the K-th largest key of each expert in the pool.

    Args:
        keys_TE: int64 keys of this rank's tokens; ranks may hold different numbers of tokens, zero included.
        k_E: int64, K of each expert, the same on every rank, from 0 to the number of tokens in the pool.
        pool: the ranks that compete.

    Returns:
        int64 ``kth_E``, above every key where K is 0, and int64 ``ties_E``: the keys equal to it that are among the
        K largest.
    """
    num_experts = keys_TE.shape[1]
    columns_E = torch.arange(num_experts, device=keys_TE.device)
    prefix_E = torch.zeros_like(k_E)
    remaining_E = k_E.clone()
    for shift, bits in DIGITS:
        bins = 1 << bits
        digit_TE = (keys_TE >> shift) & (bins - 1)
        candidate_TE = (keys_TE >> (shift + bits)) == prefix_E
        slot_TE = torch.where(candidate_TE, columns_E * bins + digit_TE, num_experts * bins)
        counts = torch.zeros(num_experts * bins + 1, dtype=torch.int64, device=keys_TE.device)
        counts.scatter_add_(0, slot_TE.flatten(), torch.ones_like(slot_TE).flatten())
        counts_EN = pool.sum(counts[:-1].view(num_experts, bins))
        at_least_EN = counts_EN.flip(1).cumsum(1).flip(1)  # keys whose digit is this one or higher
        digit_E = (at_least_EN >= remaining_E[:, None]).sum(1) - 1
        higher_E = (at_least_EN - counts_EN).gather(1, digit_E[:, None])[:, 0]
        remaining_E = remaining_E - higher_E
        prefix_E = prefix_E * bins + digit_E
    return prefix_E, remaining_E


def select_top_k(scores_TE: Tensor, k_E: Tensor, pool: Pool) -> Tensor:
    """Select for each expert its K best tokens of the pool.

    Args:
        scores_TE: fp32 scores of this rank's tokens.
        k_E: int64, how many tokens each expert takes from the pool, the same on every rank.
        pool: the ranks that compete.

    Returns:
        bool mask_TE of this rank's tokens; over the ranks of the pool, column e has exactly K tokens set.
    """
    keys_TE = sort_keys(scores_TE)
    kth_E, ties_E = kth_largest(keys_TE, k_E, pool)
    tie_TE = keys_TE == kth_E
    tie_number_TE = tie_TE.cumsum(0) + pool.sum_before(tie_TE.sum(0))  # from 1, by rank, then by token
    return (keys_TE > kth_E) | (tie_TE & (tie_number_TE <= ties_E))


def kth_value(scores_TE: Tensor, k_E: Tensor, pool: Pool) -> Tensor:
    """Return the K-th largest score of each expert in the pool.

    Args:
        scores_TE: fp32 scores of this rank's tokens.
        k_E: int64, K of each expert, the same on every rank.
        pool: the ranks that compete.

    Returns:
        fp32 [E], the same on every rank; NaN where K is 0.
    """
    kth_E, _ = kth_largest(sort_keys(scores_TE), k_E, pool)
    return key_values(kth_E)
