"""Auxiliary losses where their values are known, and where nothing is left to compute them of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffmoe_ds.config.load import load_config
from diffmoe_ds.moe.auxiliary import auxiliary_losses
from diffmoe_ds.moe.null_images import find_null_images
from diffmoe_ds.moe.routers import token_choice
from diffmoe_ds.moe.scores import score_tokens
from tests.unit.test_auxiliary import (
    LOSSES,
    TEMPERATURE,
    Case,
    R,
    S,
    assert_same,
    config_of,
    data_parallel,
    random_case,
)


def losses_of(kind: str, tokens_TR: Tensor, vectors_ER: Tensor, mask_TE: Tensor) -> dict[str, list[Tensor]]:
    case = Case("linear", "softmax", 1, None, tokens_TR, vectors_ER, mask_TE)
    return data_parallel(config_of(kind), case)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_without_losses_nothing_is_sent():
    """Not even the number of images that are not null."""
    keys = ("routing.capacity_predictor=false", "routing.unconditional_expert=true")
    config = load_config("fashion", ["routing.kind=expert_choice", *keys])
    tokens_TR, mask_TE = random(2 * config.tokens_per_image, R), torch.ones(2 * config.tokens_per_image, 3) > 0
    scored = score_tokens("linear", "softmax", tokens_TR, random(3, R))
    null = find_null_images(torch.tensor([True, False]))
    assert auxiliary_losses(config, scored, mask_TE, SimpleNamespace(size=2), null) == {}


@pytest.mark.parametrize("active", ((), (2,), (0, 2)))
@pytest.mark.parametrize("temperature", (TEMPERATURE, 1e-4))
def test_contrastive_loss_needs_two_active_experts(active, temperature):
    """Below, it is 0 and no gradient is NaN, even where cosines divided by the temperature are large."""
    config = config_of("token_choice", "softmax", "contrastive")
    routing = config.routing.model_copy(update={"contrastive_temperature": temperature})
    config = config.model_copy(update={"routing": routing})
    for ranks in (1, 2):
        case = random_case("token_choice", ranks, None, 2, seed=1)
        mask_TE = torch.zeros(len(case.tokens_TR), 3, dtype=torch.bool)
        mask_TE[:, list(active)] = True
        values = data_parallel(config, case._replace(vectors_ER=random(3, R), mask_TE=mask_TE))["contrastive"]
        assert all(value.isfinite().all() for value in values)
        assert any(value.any() for value in values) == (len(active) > 1)


def test_an_inactive_expert_has_no_gradient_of_the_contrastive_loss():
    case = random_case("token_choice", 2, None, 2, seed=1)
    mask_TE = torch.tensor([[True, False, False], [False, False, True]] * 8)
    case = case._replace(vectors_ER=random(3, R), mask_TE=mask_TE)
    _, _, gradient_ER = data_parallel(config_of("token_choice", "softmax", "contrastive"), case)["contrastive"]
    assert not gradient_ER[1].any() and gradient_ER[0].any() and gradient_ER[2].any()


def test_contrastive_loss_of_identical_means_is_the_logarithm_of_their_number():
    tokens_TR = torch.ones(3 * S, R)
    found = losses_of("token_choice", tokens_TR, random(4, R), torch.ones(3 * S, 4, dtype=torch.bool))
    torch.testing.assert_close(found["contrastive"][0], torch.tensor(4.0).log())
    per_image = losses_of("expert_choice", tokens_TR, random(4, R), torch.ones(3 * S, 4, dtype=torch.bool))
    torch.testing.assert_close(per_image["contrastive"][0], torch.tensor(4.0).log())


def test_means_are_those_of_the_pool_or_of_an_image():
    """Two images with opposite tokens: an expert that takes from both has the mean 0, and no direction."""
    tokens_TR = torch.cat([torch.ones(S, R), -torch.ones(S, R)])
    mask_TE = torch.tensor([[True, False], [False, True], [True, True], [False, True]] * 2)
    vectors_ER = torch.cat([torch.ones(1, R), -torch.ones(1, R)])
    for kind in ("token_choice", "expert_choice"):
        loss = losses_of(kind, tokens_TR, vectors_ER, mask_TE)["contrastive"][0]
        torch.testing.assert_close(loss, torch.tensor(2.0).log())
    mask_TE[0] = ~mask_TE[0]  # the first expert takes more of the second image, the second expert more of the first
    loss = losses_of("token_choice", tokens_TR, vectors_ER, mask_TE)["contrastive"][0]
    opposite = torch.tensor(2 / TEMPERATURE)
    torch.testing.assert_close(loss, opposite + (-opposite).exp().log1p())
    per_image = losses_of("expert_choice", tokens_TR, vectors_ER, mask_TE)["contrastive"][0]
    torch.testing.assert_close(per_image, torch.tensor(2.0).log())


def test_orthogonality_loss():
    """0 for orthogonal vectors of any length, E^2 - E for parallel ones; the same on every rank."""
    tokens_TR, mask_TE = random(S, R), torch.ones(S, 4, dtype=torch.bool)

    def loss(vectors_ER: Tensor) -> list[Tensor]:
        return losses_of("batch_pool", tokens_TR, vectors_ER, mask_TE[:, : len(vectors_ER)])["orthogonality"]

    orthogonal = loss(torch.diag(torch.tensor([0.1, 1.0, -2.0, 30.0])) @ torch.eye(4, R))
    assert orthogonal[0] == 0 and not orthogonal[1].any() and not orthogonal[2].any()
    parallel_ER = torch.ones(4, R) * torch.tensor([[0.5], [2.0], [-1.0], [3.0]])
    torch.testing.assert_close(loss(parallel_ER)[0], torch.tensor(12.0))
    half_right = torch.cat([torch.eye(1, R), torch.tensor([[1.0, 1.0, 0, 0, 0, 0]]) / 2])
    torch.testing.assert_close(loss(half_right)[0], torch.tensor(2 * 0.5))  # 45 degrees, in both orders
    case = random_case("batch_pool", 3, None, 1, seed=2)
    one = data_parallel(config_of("batch_pool"), case._replace(ranks=1))["orthogonality"]
    assert_same(data_parallel(config_of("batch_pool"), case)["orthogonality"], one)


@pytest.mark.parametrize("score", ("softmax", "sigmoid", "identity"))
def test_balance_loss_is_1_when_balanced(score):
    """Whatever the probabilities are; and E if all tokens go to one expert that the router is sure of."""
    experts, tokens_TR = 4, random(8 * S, R)
    for k in (1, 2):
        number_T = torch.arange(len(tokens_TR))
        mask_TE = torch.stack([(number_T + shift) % experts < k for shift in range(experts)], dim=1)
        case = Case("linear", score, 2, None, tokens_TR, random(experts, R, seed=1), mask_TE)
        found = data_parallel(config_of("token_choice", score, "balance"), case)
        torch.testing.assert_close(found["balance"][0], torch.tensor(1.0))
    sure_ER = torch.zeros(experts, R)
    sure_ER[:, 0] = torch.tensor([50.0, -50, -50, -50])
    case = Case("linear", score, 2, None, torch.ones(8 * S, R), sure_ER, torch.eye(4)[[0] * 8 * S].bool())
    found = data_parallel(config_of("token_choice", score, "balance"), case)
    torch.testing.assert_close(found["balance"][0], torch.tensor(float(experts)))


def test_similarity_loss_is_1_for_a_uniform_router():
    """If tokens take more than one expert, whichever these are; with one, the half with the pairs is missing."""
    tokens_TR, uniform_ER = random(4 * S, R), torch.zeros(4, R)
    for k, value in ((1, 1 / 4), (2, 1.0), (3, 1.0)):
        mask_TE = token_choice(torch.rand(len(tokens_TR), 4, generator=torch.Generator().manual_seed(k)), k)
        found = losses_of("token_choice", tokens_TR, uniform_ER, mask_TE)["similarity"]
        torch.testing.assert_close(found[0], torch.tensor(value))


def test_z_loss_of_zero_logits_is_the_squared_logarithm_of_the_number_of_experts():
    mask_TE = torch.ones(S, 3, dtype=torch.bool)
    found = losses_of("token_choice", random(S, R), torch.zeros(3, R), mask_TE)["z"]
    torch.testing.assert_close(found[0], torch.tensor(3.0).log().square())


def test_a_router_has_the_losses_with_a_weight():
    assert config_of("token_choice").auxiliary_losses == LOSSES
    assert config_of("expert_choice").auxiliary_losses == config_of("batch_pool").auxiliary_losses == LOSSES[1:]
    assert config_of("token_choice", "softmax", "z", "similarity").auxiliary_losses == ("z", "similarity")
    assert config_of("dense").auxiliary_losses == ()
