"""EC-DiT: each expert takes its best tokens of each image.

Legend: B images, S tokens per image, T = B * S tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_choice(scores_TE: Tensor, tokens_per_image: int, rows_BE: Tensor) -> Tensor:
    """The best tokens of each image for each expert.

    Args:
        scores_TE: fp32 scores, images one after the other.
        tokens_per_image: S.
        rows_BE: int64, how many tokens of an image an expert takes.

    Returns:
        bool mask_TE; of equal scores the earlier token wins.
    """
    scores_BSE = scores_TE.detach().unflatten(0, (-1, tokens_per_image))
    order_BSE = scores_BSE.sort(dim=1, descending=True, stable=True).indices
    place_S = torch.arange(tokens_per_image, device=scores_TE.device)[None, :, None].expand_as(order_BSE)
    place_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, place_S)
    return (place_BSE < rows_BE[:, None, :]).flatten(0, 1)
