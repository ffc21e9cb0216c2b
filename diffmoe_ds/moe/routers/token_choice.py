"""TC-DiT: every token takes its k best experts, none is dropped.  Legend: T tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_ds.moe.top_k import Pool


def token_choice(scores_TE: Tensor, k: int) -> Tensor:
    """bool mask_TE with the k best experts of each token; of equal scores the lower expert number wins."""
    best_Tk = scores_TE.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, best_Tk, True)


def balance_loss(scores_TE: Tensor, mask_TE: Tensor, pool: Pool) -> Tensor:
    """Load-balance loss of the Switch Transformer (arXiv 2101.03961, eq. 4), scalar fp32.

    E * sum_e f_e * P_e, with f the share of the pool's routed rows that went to an expert and P the mean score
    of this rank's tokens.  f is counted over the whole pool, so the mean of the loss over the ranks, and its
    gradient, are those of one rank holding all tokens.
    """
    rows_E = pool.sum(mask_TE.sum(0))
    share_E = rows_E.float() / rows_E.sum().clamp(min=1)
    return scores_TE.shape[1] * (share_E * scores_TE.mean(0)).sum()
