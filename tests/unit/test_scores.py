"""From what the router reads to scores, and from scores to the weights of the experts' outputs."""

from __future__ import annotations

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe_ds.config.routing import RoutingConfig
from diffmoe_ds.moe.routers import token_choice
from diffmoe_ds.moe.scores import SCORES, output_weights, probabilities, score_tokens, unit

AFFINITIES = ("linear", "cosine")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_logits(affinity: str, tokens_TR: np.ndarray, vectors_ER: np.ndarray) -> np.ndarray:
    if affinity == "linear":
        return tokens_TR @ vectors_ER.T
    norms_TE = np.linalg.norm(tokens_TR, axis=1)[:, None] * np.linalg.norm(vectors_ER, axis=1)[None, :]
    return (tokens_TR @ vectors_ER.T) / norms_TE


def expected_scores(score: str, logits_TE: np.ndarray) -> np.ndarray:
    if score == "softmax":
        return np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    return 1 / (1 + np.exp(-logits_TE)) if score == "sigmoid" else logits_TE


def test_every_score_function_of_a_recipe_is_known():
    assert set(get_args(RoutingConfig.model_fields["score"].annotation)) == set(SCORES)


@pytest.mark.parametrize(("affinity", "score"), tuple(product(AFFINITIES, SCORES)))
def test_scores_equal_the_formulas(affinity, score):
    tokens_TR, vectors_ER = 3 * random(20, 6, seed=1), random(4, 6, seed=2)
    scored = score_tokens(affinity, score, tokens_TR, vectors_ER)
    logits_TE = expected_logits(affinity, tokens_TR.double().numpy(), vectors_ER.double().numpy())
    np.testing.assert_allclose(scored.logits_TE.numpy(), logits_TE, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored.scores_TE.numpy(), expected_scores(score, logits_TE), rtol=1e-4, atol=1e-5)
    assert scored.tokens_TR is tokens_TR and scored.vectors_ER is vectors_ER


@pytest.mark.parametrize(("affinity", "score"), tuple(product(AFFINITIES, SCORES)))
def test_gradients_reach_tokens_and_vectors(affinity, score):
    inputs = [random(5, 6, seed=1).requires_grad_(), random(4, 6, seed=2).requires_grad_()]
    scores_TE = score_tokens(affinity, score, *inputs).scores_TE
    found = torch.autograd.grad(scores_TE, inputs, random(5, 4, seed=3))

    tokens_TR, vectors_ER = exact = [value.detach().double().requires_grad_() for value in inputs]
    logits_TE = tokens_TR @ vectors_ER.T
    if affinity == "cosine":
        logits_TE = logits_TE / tokens_TR.norm(dim=1)[:, None] / vectors_ER.norm(dim=1)
    directly = {"softmax": logits_TE.softmax(1), "sigmoid": logits_TE.sigmoid(), "identity": logits_TE}[score]
    expected = torch.autograd.grad(directly, exact, random(5, 4, seed=3).double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_biases_are_added_to_products(dtype):
    tokens_TR, vectors_ER, bias_E = (random(*shape).to(dtype) for shape in ((20, 6), (4, 6), (4,)))
    scored = score_tokens("mlp", "sigmoid", tokens_TR, vectors_ER, bias_E)
    expected_TE = tokens_TR.float() @ vectors_ER.float().T + bias_E.float()
    torch.testing.assert_close(scored.logits_TE, expected_TE)
    torch.testing.assert_close(scored.scores_TE, expected_TE.sigmoid())


def test_cosines_do_not_depend_on_lengths():
    tokens_TR, vectors_ER = random(20, 6, seed=1), random(4, 6, seed=2)
    plain = score_tokens("cosine", "identity", tokens_TR, vectors_ER).scores_TE
    scaled = score_tokens("cosine", "identity", 1e4 * tokens_TR, 1e-4 * vectors_ER).scores_TE
    torch.testing.assert_close(plain, scaled)
    assert plain.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_zero_vectors_have_a_cosine_of_0_and_finite_gradients(dtype):
    tokens_TR, vectors_ER = random(6, 8, seed=1).to(dtype), random(4, 8, seed=2).to(dtype)
    tokens_TR[2], vectors_ER[1] = 0, 0
    inputs = [tokens_TR.requires_grad_(), vectors_ER.requires_grad_()]
    scored = score_tokens("cosine", "softmax", *inputs)
    assert not scored.logits_TE[2].any() and not scored.logits_TE[:, 1].any()
    assert scored.scores_TE[2].tolist() == [0.25] * 4
    gradients = torch.autograd.grad(scored.scores_TE, inputs, random(6, 4, seed=3))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_unit_vectors_have_length_1_or_0():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=torch.bfloat16)
    found = unit(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize(("affinity", "score"), tuple(product(AFFINITIES, SCORES)))
def test_bf16_tokens_have_fp32_scores(affinity, score):
    """Not rounded to bf16, neither the logits nor the scores; gradients have the dtype of what they belong to."""
    inputs = [random(20, 6, seed=seed).bfloat16().requires_grad_() for seed in (1, 2)]
    scored = score_tokens(affinity, score, *inputs)
    exact = score_tokens(affinity, score, *(value.detach().float() for value in inputs))
    assert scored.logits_TE.dtype == scored.scores_TE.dtype == torch.float32
    torch.testing.assert_close(scored.logits_TE, exact.logits_TE)
    torch.testing.assert_close(scored.scores_TE, exact.scores_TE)
    assert not torch.equal(scored.logits_TE, scored.logits_TE.bfloat16().float())
    gradients = torch.autograd.grad(scored.scores_TE.square().sum(), inputs)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2


@pytest.mark.parametrize("score", SCORES)
def test_probabilities_are_distributions(score):
    logits_TE = 4 * random(30, 5, seed=1)
    exact_TE = expected_scores("sigmoid" if score == "sigmoid" else "softmax", logits_TE.double().numpy())
    found_TE = probabilities(logits_TE, score)
    np.testing.assert_allclose(found_TE.numpy(), exact_TE / exact_TE.sum(1, keepdims=True), rtol=1e-4)
    torch.testing.assert_close(found_TE.sum(1), torch.ones(30))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.5, 1.0, 2.5]),
    st.sampled_from(["softmax", "sigmoid"]),
)  # fmt: skip
def test_renormalized_weights_of_a_token_add_up_to_the_scale(seed, experts, tokens, scale, score):
    """For any number of experts that take it; a token that nobody takes has finite weights and no NaN gradient."""
    logits_TE = random(tokens, experts, seed=seed).requires_grad_()
    mask_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < 0.4
    scores_TE = SCORES[score](logits_TE)
    weights_TE = output_weights(scores_TE, mask_TE, True, scale)
    sums_T = (weights_TE * mask_TE).sum(1)
    torch.testing.assert_close(sums_T, scale * mask_TE.any(1).float())
    assert weights_TE.isfinite().all()
    for t, e in mask_TE.nonzero().tolist():
        expected = scale * scores_TE[t, e].item() / sum(scores_TE[t][mask_TE[t]].tolist())
        assert weights_TE[t, e].item() == pytest.approx(expected, rel=1e-5)
    (gradient_TE,) = torch.autograd.grad(weights_TE, logits_TE, mask_TE * random(tokens, experts, seed=seed + 1))
    assert gradient_TE.isfinite().all() and not gradient_TE[~mask_TE.any(1)].any()


def test_weights_of_underflown_scores_are_finite():
    """Sigmoids of very negative logits are 0 in fp32, also those of the experts that take the token."""
    logits_TE = torch.full((3, 4), -1e3, requires_grad=True)
    weights_TE = output_weights(logits_TE.sigmoid(), token_choice(logits_TE, 2), True, 2.0)
    weights_TE.sum().backward()
    assert not weights_TE.any() and not logits_TE.grad.any()


@pytest.mark.parametrize("renormalize", (False, True))
def test_no_tokens_have_no_weights(renormalize):
    assert output_weights(torch.rand(0, 4), torch.ones(0, 4, dtype=torch.bool), renormalize, 2.0).shape == (0, 4)


def test_without_renormalizing_weights_are_the_scores():
    scores_TE, mask_TE = random(6, 3), torch.eye(6, 3, dtype=torch.bool)
    assert torch.equal(output_weights(scores_TE, mask_TE, False, 1.0), scores_TE)
    assert torch.equal(output_weights(scores_TE, mask_TE, False, 2.5), 2.5 * scores_TE)
