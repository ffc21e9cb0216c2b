"""Tokens that choose experts of a few groups, or with the help of biases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe_ds.config.load import load_config
from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.routers import token_choice

D = 8


def brute_force(scores_E: list[float], k: int, groups: int, kept: int) -> list[int]:
    """The experts that one token chooses, ascending."""
    size = len(scores_E) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    worth = [sum(sorted((scores_E[e] for e in experts), reverse=True)[:2]) for experts in members]
    best = sorted(range(groups), key=lambda group: (-worth[group], group))[:kept]
    choices = [score if e // size in best else 0.0 for e, score in enumerate(scores_E)]
    return sorted(sorted(range(len(choices)), key=lambda e: (-choices[e], e))[:k])


@st.composite
def cases(draw, smallest: int = -8):
    """(scores, k, groups, groups kept); the scores are eighths, so ties are common and sums exact."""
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * size))
    eighths = st.integers(smallest, 8) if draw(st.booleans()) else st.sampled_from([smallest, 1, 2])
    row = st.lists(eighths, min_size=groups * size, max_size=groups * size)
    scores_TE = torch.tensor(draw(st.lists(row, min_size=1, max_size=6))) / 8
    return scores_TE, k, groups, kept


def chosen(mask_TE: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask_TE]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_groups_equal_brute_force(case):
    scores_TE, k, groups, kept = case
    mask_TE = token_choice(scores_TE, k, groups, kept)
    assert mask_TE.dtype == torch.bool and mask_TE.shape == scores_TE.shape
    assert chosen(mask_TE) == [brute_force(row, k, groups, kept) for row in scores_TE.tolist()]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(smallest=1))
def test_positive_scores_choose_from_the_kept_groups(case):
    scores_TE, k, groups, kept = case
    mask_TE = token_choice(scores_TE, k, groups, kept)
    assert (mask_TE.unflatten(1, (groups, -1)).any(2).sum(1) <= kept).all() and (mask_TE.sum(1) == k).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_keeping_all_groups_is_choosing_without_groups(case):
    scores_TE, k, groups, _ = case
    assert torch.equal(token_choice(scores_TE, k, groups, groups), token_choice(scores_TE, k))


def test_ties_go_to_the_lower_index():
    equal_TE = torch.full((1, 6), 0.5)
    assert chosen(token_choice(equal_TE, 1, 3, 1)) == [[0]]
    assert chosen(token_choice(equal_TE, 3, 3, 2)) == [[0, 1, 2]]
    later = torch.tensor([[0.1, 0.1, 0.5, 0.25, 0.25, 0.5]])  # groups 1 and 2 are worth the same
    assert chosen(token_choice(later, 2, 3, 1)) == [[2, 3]]
    assert chosen(token_choice(later, 2, 3, 2)) == [[2, 5]]


def test_the_two_best_experts_decide_about_a_group():
    """Neither the best expert nor the sum of all."""
    scores_TE = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    assert chosen(token_choice(scores_TE, 1, 3, 1)) == [[3]]


def test_a_negative_score_of_a_kept_group_loses_against_the_left_groups():
    """The published code of DSMoE sets the scores of left groups to 0, not to minus infinity.

    Scores are positive, but with biases they may be negative. A token may then choose experts of groups that it has
    left; the lower index first, as all of them count as 0.
    """
    scores_TE = torch.tensor([[-0.5, -0.5, 0.75, -0.25, 0.25, 0.25]])  # the groups are worth -1, 0.5 and 0.5
    assert chosen(token_choice(scores_TE, 1, 3, 1)) == [[2]]
    assert chosen(token_choice(scores_TE, 2, 3, 1)) == [[0, 2]]
    all_negative = torch.tensor([[-0.5, -0.5, -0.25, -0.25]])
    assert chosen(token_choice(all_negative, 2, 2, 1)) == [[0, 1]]
    assert chosen(token_choice(all_negative, 2, 2, 2)) == [[2, 3]]


def test_the_choice_has_no_gradient():
    scores_TE = torch.ones(4, 6, requires_grad=True)
    assert not token_choice(scores_TE, 2, 3, 2).requires_grad


def route(bias_E: Tensor | None, *overrides: str) -> Routing:
    """Route 32 tokens of a layer with 8 experts and these biases."""
    rate = () if bias_E is None else ("routing.bias_rate=0.001",)
    common = ("model.input_size=16", "routing.kind=token_choice", "routing.capacity=2", "routing.score=sigmoid")
    layer = MoELayer(load_config("fashion", [*common, *rate, *overrides]), D).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    if bias_E is not None:
        layer.correction_bias.copy_(bias_E)
    _, routing = layer(torch.randn(2, 16, D, generator=generator))
    return routing


def test_a_bias_changes_who_is_taken_but_no_weight():
    plain = route(None)
    bias_E = torch.zeros(8)
    bias_E[5] = 2
    biased = route(bias_E)
    assert not plain.mask_TE[:, 5].all() and biased.mask_TE[:, 5].all()
    assert torch.equal(biased.mask_TE.sum(1), torch.full((32,), 2))
    assert torch.equal(biased.weights_TE, plain.weights_TE) and biased.weights_TE.max() < 1


def test_weights_are_renormalized_over_the_experts_that_biases_have_chosen():
    scores_TE = route(None).weights_TE
    bias_E = torch.linspace(-0.5, 0.5, 8)
    routing = route(bias_E, "routing.renormalize=true", "routing.weight_scale=2.5")
    assert torch.equal(routing.mask_TE, token_choice(scores_TE + bias_E, 2))
    expected_TE = 2.5 * scores_TE / (scores_TE * routing.mask_TE).sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TE, expected_TE)


@pytest.mark.parametrize("bias_E", (torch.zeros(8), torch.full((8,), 0.25)))
def test_equal_biases_change_nothing(bias_E):
    assert torch.equal(route(bias_E).mask_TE, route(None).mask_TE)


def test_biases_also_choose_groups():
    grouped = ("routing.groups=4", "routing.groups_kept=1")
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert chosen(route(bias_E, *grouped).mask_TE) == [[4, 5]] * 32
    plain = route(None, *grouped)
    assert chosen(plain.mask_TE) == [brute_force(row, 2, 4, 1) for row in plain.weights_TE.tolist()]
    assert len({tuple(experts) for experts in chosen(plain.mask_TE)}) > 1
