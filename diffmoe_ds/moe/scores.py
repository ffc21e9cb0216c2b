"""From a router's input to scores, and from the scores of the experts taken to the weights of their outputs.

Logits are products of tokens and one vector for each expert, possibly with a hidden layer before, or the cosines of the
angles between them (prototypes). A score function turns logits into scores, which decide who is taken. Weights are the
scores of those who are, possibly normalized and scaled.

Legend: T tokens of this rank, E experts, R width of what the router reads.
Sources: Switch Transformer (arXiv 2101.03961), DeepSeek-V3 (2412.19437), ProMoE (2510.24711), DSMoE (2512.01252).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.logits import fp32_linear

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits_TE: logits_TE,
}
"""The function of each ``routing.score``."""


class Scored(NamedTuple):
    """Tokens and their scores; with gradients."""

    tokens_TR: Tensor
    """What the last layer of the router read."""
    vectors_ER: Tensor
    """The router's vector of each expert."""
    logits_TE: Tensor
    """fp32."""
    scores_TE: Tensor
    """fp32."""


def score_tokens(
    affinity: str, score: str, tokens_TR: Tensor, vectors_ER: Tensor, bias_E: Tensor | None = None
) -> Scored:
    """Score tokens for each expert.

    Args:
        affinity: ``cosine``, or else a product.
        score: a key of `SCORES`.
        tokens_TR: any float dtype.
        vectors_ER: weights or prototypes, in the dtype of the model.
        bias_E: added to products, likewise.
    """
    if affinity == "cosine":
        logits_TE = fp32_linear(unit(tokens_TR), unit(vectors_ER))
    else:
        logits_TE = fp32_linear(tokens_TR, vectors_ER, bias_E)
    return Scored(tokens_TR, vectors_ER, logits_TE, SCORES[score](logits_TE))


def unit(vectors: Tensor) -> Tensor:
    """Return vectors, along the last dimension, in fp32 and with a length of 1; a zero vector stays one."""
    return F.normalize(vectors.float(), dim=-1)


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    """Return each token's distribution over the experts, for losses: sigmoids divided by their sum (DeepSeek-V3, eq.
    19), or the softmax of the logits.

    Args:
        logits_TE: fp32.
        score: the router's score function.
    """
    if score == "sigmoid":
        return F.normalize(logits_TE.sigmoid(), p=1, dim=-1)
    return logits_TE.softmax(dim=-1)


def output_weights(scores_TE: Tensor, mask_TE: Tensor, renormalize: bool, scale: float) -> Tensor:
    """Return by what the output of an expert is multiplied if it takes the token.

    Args:
        scores_TE: fp32, positive if they are renormalized.
        mask_TE: bool, expert e takes token t.
        renormalize: divide by the sum of a token's scores of the experts that take it.
        scale: factor of all weights.

    Returns:
        fp32; meaningless where the expert does not take the token.
    """
    if renormalize:
        sum_T1 = (scores_TE * mask_TE).sum(dim=1, keepdim=True)
        scores_TE = scores_TE / sum_T1.masked_fill(sum_T1 == 0, 1)
    return scores_TE if scale == 1 else scores_TE * scale
