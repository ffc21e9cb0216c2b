"""Routing rules, as pure functions that assign tokens to experts from the router's scores.

`token_choice` and `expert_choice` decide from the tokens of one rank. Under `batch_pool` all tokens of a pool of ranks
compete, and under `expert_race` all pairs of a token and an expert: the rules here give their number K, and
`moe/top_k.py` finds the K best exactly.
`MoELayer` chooses between the rules.

Legend: B images, S tokens per image, T = B * S tokens of this rank, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_ds.moe.capacity import tokens_per_expert
from diffmoe_ds.moe.search import Pool

# ---------------------------------------------------------------------------------------------- token_choice (TC-DiT)


def token_choice(scores_TE: Tensor, k: int, groups: int = 1, groups_kept: int = 1) -> Tensor:
    """Select the k best experts of each token; no token is dropped.

    Args:
        scores_TE: router scores, possibly with biases.
        k: experts per token.
        groups: groups of consecutive experts, each worth the sum of its two largest scores.
        groups_kept: the best groups stay; the scores of all other experts count as 0 (DeepSeek-V3, arXiv 2412.19437).

    Returns:
        bool mask_TE; ties go to the lower index of an expert or group.
    """
    scores_TE = scores_TE.detach()
    if groups_kept < groups:
        scores_TGE = scores_TE.unflatten(1, (groups, -1))
        worth_TG = scores_TGE.topk(2, dim=-1).values.sum(dim=-1)
        is_kept_TG = _best(worth_TG, groups_kept)
        scores_TE = scores_TGE.masked_fill(~is_kept_TG[:, :, None], 0).flatten(1)
    return _best(scores_TE, k)


def _best(values_TN: Tensor, k: int) -> Tensor:
    """Return bool [T, N]: the k largest values of each row; ties go to the lower index."""
    best_Tk = values_TN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values_TN, dtype=torch.bool).scatter_(1, best_Tk, True)


# --------------------------------------------------------------------------------------------- expert_choice (EC-DiT)


def expert_choice(scores_TE: Tensor, tokens_per_expert_BE: Tensor) -> Tensor:
    """Select for each expert its best tokens of each image.

    Args:
        scores_TE: fp32 router scores, image by image.
        tokens_per_expert_BE: int64, how many tokens of each image an expert takes.

    Returns:
        bool mask_TE; ties go to the earlier token.
    """
    scores_BSE = scores_TE.detach().view(len(tokens_per_expert_BE), -1, scores_TE.shape[1])
    order_BSE = scores_BSE.sort(dim=1, descending=True, stable=True).indices
    rank_S = torch.arange(scores_BSE.shape[1], device=scores_TE.device)[None, :, None].expand_as(order_BSE)
    rank_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, rank_S)
    return (rank_BSE < tokens_per_expert_BE[:, None, :]).flatten(0, 1)


def expert_choice_static(tokens: int, num_experts: int, capacity: float) -> int:
    """Return the training rule's count: K = floor(C * S / E) tokens of each image.

    Args:
        tokens: S.
        num_experts: E.
        capacity: C, the average number of experts per token.
    """
    return tokens_per_expert(capacity, tokens, num_experts)


def expert_choice_dynamic(predicted_TE: Tensor, images: int) -> Tensor:
    """Count for each image the tokens that the capacity predictor assigns to each expert.

    Args:
        predicted_TE: bool, the tokens that the predictor assigns to each expert.
        images: B.

    Returns:
        int64 tokens_per_expert_BE.
    """
    return predicted_TE.view(images, -1, predicted_TE.shape[1]).sum(1)


# ----------------------------------------------------------------------------------------------- batch_pool (DiffMoE)


def batch_pool_static(tokens: int, num_experts: int, capacity: float, pool: Pool) -> int:
    """Return the training rule's count: K = floor(C * T_pool / E) tokens for each expert (arXiv 2503.14487, sec. 3.2).

    Args:
        tokens: T, of this rank; every rank of the pool holds the same number of tokens.
        num_experts: E.
        capacity: C, the average number of experts per token.
        pool: the ranks that compete.
    """
    return tokens_per_expert(capacity, tokens * pool.size, num_experts)


def batch_pool_dynamic(predicted_TE: Tensor, pool: Pool) -> Tensor:
    """Count the tokens of the pool that the capacity predictor assigns to each expert, the paper's inference rule.

    Args:
        predicted_TE: bool, the tokens that the predictor assigns to each expert.
        pool: the ranks that compete.

    Returns:
        int64 K_E, the same on every rank.
    """
    return pool.sum(predicted_TE.sum(0))


# -------------------------------------------------------------------------------------------------------- expert_race


def expert_race_static(tokens: int, capacity: float, pool: Pool) -> int:
    """Return the training rule's count: K = floor(C * T_pool) pairs of a token and an expert (arXiv 2503.16057).

    Args:
        tokens: T, of this rank; every rank of the pool holds the same number of tokens.
        capacity: C, the average number of experts per token.
        pool: the ranks that compete.
    """
    return tokens_per_expert(capacity, tokens * pool.size, 1)
