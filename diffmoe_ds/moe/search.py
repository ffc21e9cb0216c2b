"""The K-th largest key of each expert, over all ranks of a pool: an exact search with a few small all-reduces.

Usually two. Keys are counted by their distance from the key that the last search found, in bins whose width is a 32nd
of that distance: from one step to the next the K-th key moves past few tokens, so the bin that contains it holds very
few. The second message carries those keys themselves, by rank, and with them the number of tokens that each rank
contributes. It also shows whether any rank had more keys in its bin than fit, as may happen after a jump and without an
earlier search. Then the K-th key is found digit by digit, most significant first (a radix search), in four messages.

The size of the messages does not depend on the number of tokens, and the result does not depend on the last key.

Legend: T tokens of this rank, W ranks of the pool, E experts, N bins, M candidates sent by a rank, K tokens that an
expert takes from the whole pool. Keys are int32.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST, SMALLEST = (1 << 31) - 1, -(1 << 31)
"""The largest int32, the key of NaN; and the smallest, which is not a key."""
MANTISSA = 5
"""A bin is 2^-5 of the distance from the last key wide."""
HALF = 33 << MANTISSA
"""Bins on each side of the last key: distances have up to 33 bits once rounded."""
BINS = 2 * HALF + 1
DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of the digits of a 32-bit key, most significant first."""


class Pool(Protocol):
    """The ranks whose tokens compete."""

    size: int
    """Number of ranks W."""
    rank: int
    """This rank's number in the pool."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum of int32 or fp32 values over the ranks; the same on every rank."""
        ...

    def stack(self, values: Tensor) -> Tensor:
        """Return the int32 values of every rank, [W, ...]; the same on every rank."""
        ...


class WarmStart:
    """The keys that the last search found; it affects the number of messages, never a verified result."""

    def __init__(self, verify_later: bool = False) -> None:
        """Start without an earlier search.

        Args:
            verify_later: do not wait for the device to learn whether a search near the last key was conclusive. The
                caller has to read `inconclusive` and, if it is set, to `forget` and search again.
        """
        self.key_E: Tensor | None = None
        self.verify_later = verify_later
        self.inconclusive: Tensor | None = None
        """bool scalar, the same on every rank; None if the last search was exact in any case."""

    def forget(self) -> None:
        """Search digit by digit the next time, which is always exact."""
        self.key_E = self.inconclusive = None


class Kth(NamedTuple):
    """The K-th largest key of each expert, the same on every rank of the pool."""

    key_E: Tensor
    """int32; the largest int32 where K is 0."""
    quota_E: Tensor
    """int64: keys equal to it that are among the K largest."""
    higher_WE: Tensor
    """int64: keys of each rank above it."""
    ties_WE: Tensor
    """int64: keys of each rank equal to it."""

    def selected_WE(self) -> Tensor:
        """Return the number of keys of each rank that are among the K largest; ties go to the lower rank."""
        before_WE = self.ties_WE.cumsum(0) - self.ties_WE
        return self.higher_WE + (self.quota_E - before_WE).clamp(min=0).minimum(self.ties_WE)


class NearSearch(NamedTuple):
    """A search near the last key that knows the bin of the K-th key; one message is left, which the caller sends."""

    table_EX: Tensor
    """int32 [E, 2 + M]: this rank's keys above the bin, its candidates, and the M largest of these themselves."""
    missing_E: Tensor
    """int64: candidates that are among the K largest keys."""

    def finish(self, every_WEX: Tensor) -> Kth:
        """Return the K-th key from the tables of all ranks of the pool; exact unless any rank `is_cut_off`."""
        higher_WE, best_WEM = every_WEX[..., 0].long(), every_WEX[..., 2:]
        sorted_EM = best_WEM.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        key_E = sorted_EM.gather(1, (self.missing_E - 1).clamp(0, sorted_EM.shape[1] - 1)[:, None])[:, 0]
        key_E = key_E.masked_fill(self.missing_E == 0, LARGEST)
        above_WE = (best_WEM > key_E[:, None]).sum(-1)
        ties_WE = (best_WEM == key_E[:, None]).sum(-1)
        return Kth(key_E, self.missing_E - above_WE.sum(0), higher_WE + above_WE, ties_WE)


def is_cut_off(table: Tensor) -> Tensor:
    """Return whether a table, or any of several, lacks candidates because they did not fit (bool scalar)."""
    return (table[..., 1] > table.shape[-1] - 2).any()


def candidates_of_rank(ranks: int) -> int:
    """Return M, the keys of a bin that a rank can send."""
    return max(8, 256 // ranks)


def kth_in_pool(keys_TE: Tensor, k_E: Tensor, pool: Pool, warm: WarmStart) -> Kth:
    """Find the K-th largest key of each expert in the pool.

    Args:
        keys_TE: int32 keys of this rank's tokens; ranks may hold different numbers of tokens, zero included.
        k_E: int64, K of each expert, the same on every rank, from 0 to the number of tokens in the pool.
        pool: the ranks that compete.
        warm: of the last search, the same on every rank; replaced.
    """
    found, inconclusive = None, None
    if warm.key_E is not None and warm.key_E.shape == k_E.shape:
        near = start_near(keys_TE, k_E, pool, warm.key_E)
        every_WEX = pool.stack(near.table_EX)
        found, inconclusive = near.finish(every_WEX), is_cut_off(every_WEX)
        if not warm.verify_later and inconclusive:
            found, inconclusive = None, None
    if found is None:
        found = _search_digits(keys_TE, k_E, pool)
    warm.key_E, warm.inconclusive = found.key_E, inconclusive
    return found


def start_near(keys_TE: Tensor, k_E: Tensor, pool: Pool, center_E: Tensor) -> NearSearch:
    """Count the keys of the pool by their distance from ``center_E``, in one message.

    Args:
        keys_TE: as in `kth_in_pool`.
        k_E: as in `kth_in_pool`.
        pool: the ranks that compete.
        center_E: int32 keys, the same on every rank, preferably close to the K-th.
    """
    bin_TE = _distance_bins(keys_TE, center_E)
    bin_E, higher_E = _bin_of_kth(pool.sum(_histogram(bin_TE, None, BINS)), k_E)
    is_candidate_TE = bin_TE == bin_E
    width = candidates_of_rank(pool.size)
    counts_E2 = torch.stack([(bin_TE > bin_E).sum(0), is_candidate_TE.sum(0)], dim=1)
    best_ET = keys_TE.masked_fill(~is_candidate_TE, SMALLEST).T
    best_EM = best_ET.topk(min(width, len(keys_TE)), dim=1, sorted=False).values
    best_EM = F.pad(best_EM, (0, width - best_EM.shape[1]), value=SMALLEST)
    return NearSearch(torch.cat([counts_E2.to(torch.int32), best_EM], dim=1), k_E - higher_E)


def _distance_bins(keys_TE: Tensor, center_E: Tensor) -> Tensor:
    """Return int64 bins in [0, BINS) that increase with the key; the nearer the center, the narrower."""
    distance = keys_TE.long() - center_E.long()
    bits = distance.abs().float().view(torch.int32) >> (23 - MANTISSA)  # exponent and leading bits of the mantissa
    steps = bits - (127 << MANTISSA) + 1  # from 1, for a distance of 1; negative for 0
    return torch.where(distance < 0, -steps, steps).where(distance != 0, 0).long() + HALF


def _search_digits(keys_TE: Tensor, k_E: Tensor, pool: Pool) -> Kth:
    """Search without an earlier key, and with any number of ties."""
    shifted_TE = keys_TE.long() + (1 << 31)  # 0 to 2^32 - 1
    prefix_E, missing_E = torch.zeros_like(k_E), k_E
    for shift, bits in DIGITS:
        digit_TE = (shifted_TE >> shift) & ((1 << bits) - 1)
        is_candidate_TE = (shifted_TE >> (shift + bits)) == prefix_E
        digit_E, higher_E = _bin_of_kth(pool.sum(_histogram(digit_TE, is_candidate_TE, 1 << bits)), missing_E)
        missing_E = missing_E - higher_E
        prefix_E = (prefix_E << bits) + digit_E
    key_E = prefix_E - (1 << 31)
    counts_E2 = torch.stack([(keys_TE > key_E).sum(0), (keys_TE == key_E).sum(0)], dim=1)
    higher_WE, ties_WE = pool.stack(counts_E2.to(torch.int32)).long().unbind(-1)
    return Kth(key_E.to(torch.int32), missing_E, higher_WE, ties_WE)


def _histogram(bin_TE: Tensor, is_counted_TE: Tensor | None, bins: int) -> Tensor:
    """Return int32 counts [E, bins] of the tokens in each bin."""
    experts = bin_TE.shape[1]
    slot_TE = bin_TE + torch.arange(experts, device=bin_TE.device) * bins
    one_TE = torch.ones_like(slot_TE, dtype=torch.int32) if is_counted_TE is None else is_counted_TE.to(torch.int32)
    counts = torch.zeros(experts * bins, dtype=torch.int32, device=bin_TE.device)
    return counts.scatter_add_(0, slot_TE.flatten(), one_TE.flatten()).view(experts, bins)


def _bin_of_kth(counts_EN: Tensor, k_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin that contains the K-th largest key of each expert, and the number of keys in the bins above."""
    up_to_EN = counts_EN.cumsum(1)
    above_EN = up_to_EN[:, -1:] - up_to_EN
    bin_E = (above_EN >= k_E[:, None]).sum(1).clamp(max=counts_EN.shape[1] - 1)  # the maximum where K is 0
    return bin_E, above_EN.gather(1, bin_E[:, None])[:, 0]
