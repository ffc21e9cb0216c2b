"""DiffMoE: each expert takes its K best tokens of a pool of images at all noise levels.

Legend: T tokens of this rank, E experts, K rows of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_ds.moe.capacity import predicted, rows_per_expert
from diffmoe_ds.moe.top_k import Pool, select_top_k


def batch_pool(scores_TE: Tensor, capacity: float, pool: Pool) -> Tensor:
    """The K = floor(C * T_pool / E) best tokens of the pool for each expert.

    Args:
        scores_TE: fp32 scores of this rank's tokens; every rank of the pool holds as many.
        capacity: C, the average number of experts per token.
        pool: the ranks that compete.

    Returns:
        bool mask_TE of this rank's tokens.
    """
    tokens, num_experts = scores_TE.shape
    rows = rows_per_expert(capacity, tokens * pool.size, num_experts)
    k_E = torch.full((num_experts,), rows, dtype=torch.int64, device=scores_TE.device)
    return select_top_k(scores_TE, k_E, pool)


def batch_pool_dynamic(scores_TE: Tensor, logits_TE: Tensor, threshold_E: Tensor, pool: Pool) -> Tensor:
    """The paper's inference: as many best tokens of the pool as the predictor counts above the threshold."""
    k_E = pool.sum(predicted(logits_TE, threshold_E).sum(0))
    return select_top_k(scores_TE, k_E, pool)
