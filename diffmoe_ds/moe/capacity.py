"""The capacity predictor: it learns whether an expert would take a token, so that sampling need not rank.

Legend: T tokens of this rank, E experts, K rows of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.top_k import Pool, kth_value


def rows_per_expert(capacity: float, tokens: int, num_experts: int) -> int:
    """K = floor(C * T / E), the rows of an expert in a pool of ``tokens`` tokens."""
    return int(capacity * tokens / num_experts + 1e-9)  # 0.29 * 100 is 28.999999999999996


def capacity_loss(logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Binary cross-entropy of the predictor's logits against what the experts took, mean over T and E (fp32)."""
    return F.binary_cross_entropy_with_logits(logits_TE.float(), mask_TE.float())


def pool_quantile(logits_TE: Tensor, rows: int, pool: Pool) -> Tensor:
    """fp32 [E]: the K-th largest predicted probability in the pool, which the thresholds follow.

    Args:
        logits_TE: the predictor's logits.
        rows: K, at least 1.
        pool: the ranks that compete.
    """
    k_E = torch.full((logits_TE.shape[1],), rows, dtype=torch.int64, device=logits_TE.device)
    return kth_value(logits_TE, k_E, pool).sigmoid()


def predicted(logits_TE: Tensor, threshold_E: Tensor) -> Tensor:
    """bool mask_TE: the predicted probability is above the expert's threshold."""
    return logits_TE.float().sigmoid() > threshold_E
