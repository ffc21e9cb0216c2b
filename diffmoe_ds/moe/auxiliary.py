"""Auxiliary losses of a router, as functions of logits, tokens and the selection, over all tokens of a pool.

Each returns this rank's part: its mean over the ranks of the pool, which is what data parallelism computes of losses
and gradients, is the loss of a single rank with all tokens. Sums over the pool carry the gradient of this rank's tokens
only, times the number of ranks, so that none is sent.

Legend: T tokens of this rank that may be routed, T_pool those of the pool, E experts, R width of what the router reads,
B images, W ranks of the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.moe.first_pass import remember
from diffmoe_ds.moe.null_images import NullImages
from diffmoe_ds.moe.scores import Scored, probabilities, unit
from diffmoe_ds.moe.search import Pool


class Share(NamedTuple):
    """The size of the pool, per rank."""

    pool: Pool
    """The ranks over which losses are computed."""
    images: float | Tensor
    """Images of the pool whose tokens may be routed, divided by W."""
    tokens_per_image: int
    """S."""

    @property
    def tokens(self) -> float | Tensor:
        """T_pool / W."""
        return self.images * self.tokens_per_image


def auxiliary_losses(
    config: Config, scored: Scored, mask_TE: Tensor, pool: Pool, null: NullImages | None
) -> dict[str, Tensor]:
    """Return the losses of a layer by name, those of `Config.auxiliary_losses`.

    Args:
        config: the run's configuration.
        scored: the tokens of this rank with their scores.
        mask_TE: bool, the tokens that each expert takes.
        pool: the ranks to compute over.
        null: the images whose tokens are not routed, if there can be any.

    Returns:
        fp32 scalars, with gradient.
    """
    routing, names, tokens_per_image = config.routing, config.auxiliary_losses, config.tokens_per_image
    images: float | Tensor = len(mask_TE) // tokens_per_image
    is_per_image = routing.kind == "expert_choice"
    if null is not None:
        scored = Scored(*(part if part is scored.vectors_ER else null.without(part) for part in scored))
        mask_TE = null.without(mask_TE)
        routed = mask_TE.new_full((1,), len(mask_TE) // tokens_per_image, dtype=torch.int64)
        if counts_images(config):
            images = (remember(lambda: pool.sum(routed))[0] / pool.size).clamp(min=1 / pool.size)
    share = Share(pool, images, tokens_per_image)
    logits_TE, found = scored.logits_TE, {}
    if "balance" in names:
        found["balance"] = balance_loss(probabilities(logits_TE, routing.score), mask_TE, share)
    if "z" in names:
        found["z"] = z_loss(logits_TE, share)
    if "orthogonality" in names:
        found["orthogonality"] = orthogonality_loss(scored.vectors_ER)
    if "contrastive" in names:
        contrastive = image_contrastive_loss if is_per_image else contrastive_loss
        arguments = (scored.tokens_TR, scored.vectors_ER, mask_TE, routing.contrastive_temperature, share)
        found["contrastive"] = contrastive(*arguments)
    if "similarity" in names:
        found["similarity"] = similarity_loss(logits_TE.softmax(dim=-1), mask_TE, share)
    return found


def counts_images(config: Config) -> bool:
    """Return whether the losses need the number of the pool's images that are not null, if there are null ones."""
    names, is_per_image = config.auxiliary_losses, config.routing.kind == "expert_choice"
    means = {"balance", "z", "similarity", *(("contrastive",) if is_per_image else ())}
    return not means.isdisjoint(names)


def balance_loss(probabilities_TE: Tensor, mask_TE: Tensor, share: Share) -> Tensor:
    """Return the load-balance loss of the Switch Transformer (arXiv 2101.03961, eq. 4).

    E * sum_e f_e * P_e, where f_e is the fraction of the pool's routed tokens that went to expert e and P_e the mean
    probability of its tokens.

    Args:
        probabilities_TE: fp32, of the router, with gradient.
        mask_TE: bool, the tokens that each expert takes.
        share: the pool.
    """
    tokens_per_expert_E = remember(lambda: share.pool.sum(mask_TE.sum(0)))
    fraction_E = tokens_per_expert_E.float() / tokens_per_expert_E.sum().clamp(min=1)
    return probabilities_TE.shape[1] * (fraction_E * (probabilities_TE.sum(0) / share.tokens)).sum()


def z_loss(logits_TE: Tensor, share: Share) -> Tensor:
    """Return the mean over tokens of the squared logsumexp of their logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum() / share.tokens


def orthogonality_loss(vectors_ER: Tensor) -> Tensor:
    """Return the sum over i, j of (cos(v_i, v_j) - [i = j])^2 for the vectors of the experts (ERNIE 4.5)."""
    unit_ER = unit(vectors_ER)
    identity_EE = torch.eye(len(unit_ER), device=unit_ER.device)
    return (unit_ER @ unit_ER.mT - identity_EE).square().sum()


def contrastive_loss(
    tokens_TR: Tensor, vectors_ER: Tensor, mask_TE: Tensor, temperature: float, share: Share
) -> Tensor:
    """Return ProMoE's routing contrastive loss (arXiv 2510.24711) of a pool.

    With A the experts that take at least one token, and m_e the mean of the tokens of expert e,

        mean over e in A of [logsumexp over f in A of cos(v_e, m_f) / temperature - cos(v_e, m_e) / temperature],

    which is 0 if A has fewer than two. Both vectors and tokens have its gradient.

    Args:
        tokens_TR: what the router reads.
        vectors_ER: the router's vector of each expert.
        mask_TE: bool, the tokens that each expert takes.
        temperature: positive.
        share: the pool.
    """
    sum_ER = _pool_sum(mask_TE.T.float() @ tokens_TR.float(), share.pool)
    count_E = remember(lambda: share.pool.sum(mask_TE.sum(0)))
    mean_ER = sum_ER / count_E.clamp(min=1)[:, None]
    is_active_E = count_E > 0
    loss_E = _contrast(vectors_ER, mean_ER, temperature, is_active_E)
    return torch.where(is_active_E, loss_E, 0).sum() / is_active_E.sum().clamp(min=1)


def image_contrastive_loss(
    tokens_TR: Tensor, vectors_ER: Tensor, mask_TE: Tensor, temperature: float, share: Share
) -> Tensor:
    """Return ProMoE's routing contrastive loss of each image, averaged over the images of the pool.

    Args:
        tokens_TR: as in `contrastive_loss`, image by image.
        vectors_ER: as in `contrastive_loss`.
        mask_TE: bool, the tokens that each expert takes; at least one of each image.
        temperature: positive.
        share: the pool.
    """
    shape = (len(mask_TE) // share.tokens_per_image, share.tokens_per_image)
    mask_BSE, tokens_BSR = mask_TE.float().unflatten(0, shape), tokens_TR.float().unflatten(0, shape)
    mean_BER = mask_BSE.mT @ tokens_BSR / mask_BSE.sum(1).clamp(min=1)[:, :, None]
    return _contrast(vectors_ER, mean_BER, temperature).mean(dim=-1).sum() / share.images


def similarity_loss(probabilities_TE: Tensor, mask_TE: Tensor, share: Share) -> Tensor:
    """Return Expert Race's router similarity loss (arXiv 2503.16057, eqs. 9 to 11).

    (1 / T) sum_ij W_ij P'_ij with P' = P^T P and M' = M^T M over the tokens of the pool. W has no gradient; it gives
    experts, and pairs of experts, that are taken more often than others a larger weight:
    W_ii = E M'_ii / sum_i M'_ii, and W_ij = (E^2 - E) M'_ij / sum_{i != j} M'_ij. 1 for a uniform router.

    Args:
        probabilities_TE: P, the softmax of the logits, fp32, with gradient.
        mask_TE: M, bool, the tokens that each expert takes.
        share: the pool.
    """
    experts = mask_TE.shape[1]
    mask_TE = mask_TE.float()
    pairs_EE = remember(lambda: share.pool.sum((mask_TE.T @ mask_TE).long())).float()
    single_EE = torch.diag(pairs_EE.diagonal())
    double_EE = pairs_EE - single_EE
    weight_EE = experts * single_EE / single_EE.sum().clamp(min=1)
    weight_EE = weight_EE + (experts**2 - experts) * double_EE / double_EE.sum().clamp(min=1)
    return (weight_EE * (probabilities_TE.T @ probabilities_TE)).sum() / share.tokens


def _contrast(vectors_ER: Tensor, mean_ER: Tensor, temperature: float, is_active_E: Tensor | None = None) -> Tensor:
    """Return the contrastive loss of each expert; ``mean_ER`` may have more dimensions in front."""
    cosine_EE = unit(vectors_ER) @ unit(mean_ER).mT / temperature
    if is_active_E is not None:  # not -inf, of which a row without active experts has no softmax
        cosine_EE = cosine_EE.masked_fill(~is_active_E, torch.finfo(cosine_EE.dtype).min)
    return -cosine_EE.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)


def _pool_sum(values: Tensor, pool: Pool) -> Tensor:
    """Return the sum over the ranks of a pool. The gradient of this rank's part counts W times: averaged over the
    ranks, gradients are those of the sum."""
    if pool.size == 1:
        return values
    total = remember(lambda: pool.sum(values.detach()))
    return total + pool.size * (values - values.detach())
