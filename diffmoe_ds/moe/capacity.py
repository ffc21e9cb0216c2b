"""Capacity predictor: learns whether an expert takes a token, so that sampling does not have to compare tokens.

Legend: T tokens of this rank, E experts, K tokens of an expert over the pool.
Source: DiffMoE (arXiv 2503.14487), section 3.3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.search import Pool, WarmStart
from diffmoe_ds.moe.top_k import kth_value


def tokens_per_expert(capacity: float, tokens: int, num_experts: int) -> int:
    """Return K = floor(C * T / E), the number of tokens that each expert takes from ``tokens`` tokens."""
    return int(capacity * tokens / num_experts + 1e-9)  # 0.29 * 100 is 28.999999999999996


def capacity_loss(logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Return the binary cross-entropy of the predictor against the training selection.

    Args:
        logits_TE: the predictor's logits, any float dtype.
        mask_TE: bool, the tokens that each expert selected.

    Returns:
        Scalar, fp32: the mean over T and E.
    """
    return F.binary_cross_entropy_with_logits(logits_TE.float(), mask_TE.float())


def predicted_mask(logits_TE: Tensor, threshold_E: Tensor) -> Tensor:
    """Return bool mask_TE: where the predicted probability exceeds the expert's threshold."""
    return logits_TE.float().sigmoid() > threshold_E


def pool_quantile(logits_TE: Tensor, k: int, pool: Pool, warm: WarmStart | None = None) -> Tensor:
    """Return the K-th largest predicted probability in the pool, which the thresholds track.

    Args:
        logits_TE: the predictor's logits.
        k: K, at least 1.
        pool: the ranks that compete.
        warm: of the last search for the same experts.

    Returns:
        fp32 [E], the same on every rank.
    """
    # not of the logits: a search near the last one is far from it, as floats are stored, on the other side of 0
    return kth_value(logits_TE.float().sigmoid(), k, pool, warm)
