"""Exact top-k over a pool of tokens that may be spread over many ranks, without gathering scores.

The bits of a float, read as an integer, sort like the float. The K-th largest of these keys of each expert decides:
larger keys are selected, and of the keys equal to it as many as are missing. Ties are broken by rank and, within a
rank, by token index, so exactly K tokens are selected: the result equals gathering all scores and sorting them with a
stable sort. On a single rank the K-th key is found directly, over several by `moe/search.py`.

Legend: T tokens of this rank, W ranks of the pool, E experts, K tokens that an expert takes from the whole pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.search import LARGEST, Kth, Pool, WarmStart, kth_in_pool


class LocalPool:
    """The pool of a single rank, without communication."""

    size = 1
    rank = 0

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values`` themselves."""
        return values

    def stack(self, values: Tensor) -> Tensor:
        """Return ``values`` with a first dimension of 1."""
        return values[None]


class Selection(NamedTuple):
    """Tokens that the experts take."""

    mask_TE: Tensor
    """bool: the tokens of this rank that each expert takes."""
    rows_per_expert: int | None = None
    """Tokens of this rank that every expert takes, where the rule fixes this number; otherwise None."""
    counts_WE: Tensor | None = None
    """int64: tokens that each expert takes from each rank of the pool, if there are several; otherwise None."""
    rows_per_expert_in_pool: int | None = None
    """Tokens of such a pool that every expert takes, where the rule fixes this number; otherwise None."""
    kth_E: Tensor | None = None
    """fp32: the K-th largest score of each expert in the pool, NaN where K is 0; only of `select_top_k`."""


def sort_keys(scores: Tensor) -> Tensor:
    """Return int32 keys that sort like the fp32 ``scores``; -0.0 equals 0.0, NaN is above infinity."""
    bits = scores.detach().float().contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    key = torch.where(bits >= 0, magnitude, -magnitude)  # both zeros become 0
    return torch.where(magnitude > 0x7F800000, LARGEST, key)


def key_values(keys: Tensor) -> Tensor:
    """Return the fp32 scores of keys, the inverse of `sort_keys`."""
    bits = torch.where(keys >= 0, keys, -keys - (1 << 31))  # the sign bit as an int32
    return bits.to(torch.int32).view(torch.float32)


def select_top_k(scores_TE: Tensor, k: int | Tensor, pool: Pool, warm: WarmStart | None = None) -> Selection:
    """Select for each expert its K best tokens of the pool.

    Args:
        scores_TE: fp32 scores of this rank's tokens; ranks may hold different numbers of tokens, zero included.
        k: how many tokens each expert takes from the pool, from 0 to all, the same on every rank: one number for all
            experts, or int64 [E].
        pool: the ranks that compete.
        warm: of the last search for the same scores' experts; makes a search over several ranks faster.

    Returns:
        The selection; over the ranks of the pool, column e of its mask has exactly K tokens set.
    """
    keys_TE = sort_keys(scores_TE)
    kth = _kth(keys_TE, k, pool, warm)
    tie_TE = keys_TE == kth.key_E
    before_E = kth.ties_WE[: pool.rank].sum(0)
    tie_number_TE = tie_TE.cumsum(0) + before_E  # from 1, by rank, then by token
    mask_TE = (keys_TE > kth.key_E) | (tie_TE & (tie_number_TE <= kth.quota_E))
    fixed, kth_E = k if isinstance(k, int) else None, key_values(kth.key_E)
    if pool.size == 1:
        return Selection(mask_TE, rows_per_expert=fixed, kth_E=kth_E)
    return Selection(mask_TE, counts_WE=kth.selected_WE(), rows_per_expert_in_pool=fixed, kth_E=kth_E)


def kth_value(scores_TE: Tensor, k: int, pool: Pool, warm: WarmStart | None = None) -> Tensor:
    """Return the K-th largest score of each expert in the pool.

    Args:
        scores_TE: fp32 scores of this rank's tokens.
        k: as in `select_top_k`.
        pool: the ranks that compete.
        warm: as in `select_top_k`.

    Returns:
        fp32 [E], the same on every rank; NaN where K is 0.
    """
    return key_values(_kth(sort_keys(scores_TE), k, pool, warm).key_E)


def _kth(keys_TE: Tensor, k: int | Tensor, pool: Pool, warm: WarmStart | None) -> Kth:
    """Find the K-th largest key of each expert in the pool."""
    if pool.size > 1:
        k_E = torch.full_like(keys_TE[:1].flatten(), k, dtype=torch.int64) if isinstance(k, int) else k
        return kth_in_pool(keys_TE, k_E, pool, warm or WarmStart())
    key_E = _local_kth_key(keys_TE.T.contiguous(), k)
    higher_E = (keys_TE > key_E).sum(0)
    return Kth(key_E, k - higher_E, higher_E[None], (keys_TE == key_E).sum(0)[None])


def _local_kth_key(keys_ET: Tensor, k: int | Tensor) -> Tensor:
    """Return the K-th largest key of each row, and the largest int32 where K is 0."""
    if keys_ET.device.type != "cpu":  # there kthvalue is not deterministic, and reading K would synchronize
        return sorted_kth_key(keys_ET, k)
    if not isinstance(k, int):
        return torch.stack([_local_kth_key(keys, int(k)) for keys, k in zip(keys_ET.split(1), k, strict=True)])[:, 0]
    if k == 0:
        return keys_ET.new_full((len(keys_ET),), LARGEST)
    return keys_ET.kthvalue(keys_ET.shape[1] - k + 1, dim=1).values  # takes a fifth of the time of a sort


def sorted_kth_key(keys_ET: Tensor, k: int | Tensor) -> Tensor:
    """Return what `_local_kth_key` returns, without reading K on the host."""
    ordered = F.pad(keys_ET.sort(dim=1, descending=True).values, (1, 0), value=LARGEST)
    return ordered[:, k] if isinstance(k, int) else ordered.gather(1, k[:, None])[:, 0]
