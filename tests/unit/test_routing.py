"""Routing as pure functions: the exact selection against gather-and-sort, each router's rule, its losses."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.moe import top_k
from diffmoe_ds.moe.capacity import capacity_loss, pool_quantile, predicted_mask, tokens_per_expert
from diffmoe_ds.moe.plan import make_plan
from diffmoe_ds.moe.routers import (
    batch_pool_dynamic,
    batch_pool_static,
    expert_choice,
    expert_choice_dynamic,
    expert_choice_static,
    token_choice,
)
from diffmoe_ds.moe.search import WarmStart
from diffmoe_ds.moe.top_k import LocalPool, key_values, kth_value, select_top_k, sort_keys, sorted_kth_key


class ThreadPool:
    """A pool whose ranks are threads, so that hypothesis can try many pools quickly."""

    def __init__(self, shared: list, barrier: threading.Barrier, rank: int) -> None:
        self._shared, self._barrier = shared, barrier
        self.rank, self.size = rank, len(shared)
        self.messages = 0

    def _exchange(self, value: torch.Tensor) -> torch.Tensor:
        self.messages += 1
        self._shared[self.rank] = value
        self._barrier.wait(timeout=30)
        every = torch.stack(list(self._shared))
        self._barrier.wait(timeout=30)
        return every

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._exchange(values).sum(0)

    def stack(self, values: torch.Tensor) -> torch.Tensor:
        return self._exchange(values)


def on_ranks(function, parts: list[torch.Tensor]) -> list:
    """function(part, pool) on as many threads as there are parts."""
    shared, barrier = [None] * len(parts), threading.Barrier(len(parts))
    results: list = [None] * len(parts)

    def work(rank: int) -> None:
        try:
            results[rank] = function(parts[rank], ThreadPool(shared, barrier, rank))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results)
    return results


def gather_and_sort(scores_TE: torch.Tensor, k_E: torch.Tensor) -> torch.Tensor:
    """Expected selection: a stable numpy sort of all gathered scores, with independently computed keys."""
    mask = np.zeros(scores_TE.shape, dtype=bool)
    for expert, k in enumerate(k_E.tolist()):
        order = np.argsort(-scores_TE[:, expert].double().numpy(), kind="stable")
        mask[order[:k], expert] = True
    return torch.from_numpy(mask)


DENORMAL = 1e-45
PALETTES = {
    "random": None,
    "constant": [0.25],
    "tied": [0.1, 0.2, 0.3],
    "zeros": [0.0, -0.0],
    "denormal": [0.0, -0.0, DENORMAL, -DENORMAL, 3 * DENORMAL, 1.2e-38],
    "extreme": [float("inf"), -float("inf"), 3.4e38, -3.4e38, 1.0, -1.0],
    "neighbours": [1.0, 1 + 2**-23, 1 - 2**-24],
}  # fmt: skip


@st.composite
def pools(draw):
    """(scores of each rank, K of each expert): every palette, skewed ranks, empty ranks, K = 0 and K = T."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
    palette = PALETTES[draw(st.sampled_from(sorted(PALETTES)))]
    parts = []
    for rank, size in enumerate(sizes):
        if palette is None:
            values = generator.standard_normal((size, experts))
            values = values * 10.0 ** generator.integers(-30, 30, (size, experts))
            values += 1e30 * (rank == 0) * draw(st.booleans())  # the best are all on one rank
        else:
            values = generator.choice(np.array(palette, dtype=np.float32), (size, experts))
        parts.append(torch.from_numpy(values.astype(np.float32)))
    total = sum(sizes)
    k = draw(st.lists(st.sampled_from([0, 1, total // 2, total - 1, total]), min_size=experts, max_size=experts))
    return parts, torch.tensor(k)


@settings(max_examples=150, deadline=None)
@given(pools(), st.sampled_from(["cold", "same", "other", "wider"]))
def test_selection_equals_gather_and_sort(case, earlier):
    """Whatever an earlier search found, and with the counts of every rank."""
    parts, k_E = case

    def select(part, pool):
        warm = WarmStart()
        if earlier == "wider":
            select_top_k(part.repeat(1, 2), k_E.repeat(2), pool, warm)
        elif earlier != "cold":
            select_top_k(part if earlier == "same" else part.flip(1) * 3, k_E, pool, warm)
        return select_top_k(part, k_E, pool, warm)

    found = on_ranks(select, parts)
    mask = torch.cat([selection.mask_TE for selection in found])
    assert torch.equal(mask, gather_and_sort(torch.cat(parts), k_E))
    assert torch.equal(mask.sum(0), k_E)
    if len(parts) > 1:
        own = torch.stack([selection.mask_TE.sum(0) for selection in found])
        assert all(torch.equal(selection.counts_WE, own) for selection in found)


@settings(max_examples=50, deadline=None)
@given(pools())
def test_devices_find_the_same_kth_key(case):
    """GPUs sort, CPUs select; with one K for all experts or one for each."""
    parts, k_E = case
    keys_ET = sort_keys(torch.cat(parts)).T.contiguous()
    for k in (k_E, int(k_E[0])):
        assert torch.equal(sorted_kth_key(keys_ET, k), top_k._local_kth_key(keys_ET, k))


@settings(max_examples=50, deadline=None)
@given(pools())
def test_kth_value_equals_sorted(case):
    parts, k_E = case
    values = on_ranks(lambda part, pool: kth_value(part, k_E, pool), parts)
    ordered = torch.cat(parts).sort(dim=0, descending=True).values
    for expert, k in enumerate(k_E.tolist()):
        for value in values:
            assert value[expert].isnan() if k == 0 else value[expert] == ordered[k - 1, expert]


@pytest.mark.parametrize("ranks", (2, 8))
def test_search_takes_two_messages_once_it_is_warm(ranks):
    """Scores drift from step to step as they do in training: new tokens, slowly changing weights."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.linspace(1, 1.2, 6)

    def messages(part, pool):
        warm, counts = WarmStart(), []
        for scores, factor in zip(part.unbind(), drift, strict=True):
            before = pool.messages
            select_top_k((scores * factor).softmax(1), 64 * ranks, pool, warm)
            counts.append(pool.messages - before)
        return counts

    parts = torch.randn(ranks, len(drift), 1024, 16, generator=generator)
    for counts in on_ranks(messages, list(parts)):
        assert counts == [4, 2, 2, 2, 2, 2]


def test_an_inconclusive_search_says_so_and_the_next_one_is_exact():
    """All scores are nearly equal and far from the last key, so a bin holds more candidates than a message."""
    parts = [torch.rand(600, 2, generator=torch.Generator().manual_seed(rank)) * 1e-3 for rank in range(2)]

    def search(part, pool):
        warm = WarmStart(verify_later=True)
        select_top_k(part + 1e3, 600, pool, warm)
        first = select_top_k(part, 600, pool, warm), bool(warm.inconclusive)
        warm.forget()
        return *first, select_top_k(part, 600, pool, warm), warm.inconclusive

    expected = gather_and_sort(torch.cat(parts), torch.tensor([600, 600]))
    firsts, flags, seconds, verdicts = zip(*on_ranks(search, parts), strict=True)
    assert all(flags) and not torch.equal(torch.cat([s.mask_TE for s in firsts]), expected)
    assert verdicts == (None, None) and torch.equal(torch.cat([s.mask_TE for s in seconds]), expected)


def test_keys_sort_like_floats_and_convert_back():
    values = torch.tensor([-float("inf"), -3.4e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3.4e38, float("inf")])
    keys = sort_keys(values)
    assert torch.equal(keys, keys.sort().values) and len(keys.unique()) == len(values)
    assert torch.equal(key_values(keys), values)
    assert sort_keys(torch.tensor([-0.0])) == sort_keys(torch.tensor([0.0]))
    nan = torch.tensor([float("nan"), -float("nan")])
    assert (sort_keys(nan) > keys.max()).all() and key_values(sort_keys(nan)).isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_batch_pool_does_not_depend_on_the_ranks(ranks, seed, capacity):
    scores = torch.randn(48, 4, generator=torch.Generator().manual_seed(seed)).softmax(1)

    def select(part, pool):
        return select_top_k(part, batch_pool_static(*part.shape, capacity, pool), pool).mask_TE

    one = select(scores, LocalPool())
    many = on_ranks(select, list(scores.view(ranks, -1, 4)))
    assert torch.equal(torch.cat(many), one)
    assert (one.sum(0) == tokens_per_expert(capacity, 48, 4)).all()


def test_dynamic_takes_the_predicted_number_of_the_best_tokens():
    generator = torch.Generator().manual_seed(0)
    scores, logits = torch.rand(64, 4, generator=generator), torch.randn(64, 4, generator=generator)
    threshold = torch.tensor([0.0, 0.3, 0.7, 1.0])

    def select(part, pool):
        predicted = predicted_mask(part[:, 4:], threshold)
        return select_top_k(part[:, :4], batch_pool_dynamic(predicted, pool), pool).mask_TE

    parts = on_ranks(select, list(torch.cat([scores, logits], 1).view(2, 32, 8)))
    counts = predicted_mask(logits, threshold).sum(0)
    assert counts[0] == 64 and counts[3] == 0
    assert torch.equal(torch.cat(parts), gather_and_sort(scores, counts))


def test_expert_choice_is_per_image_and_stable():
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.9], [0.3, 0.2], [0.2, 0.1]] * 2)
    mask = expert_choice(scores, torch.tensor([[2, 1], [0, 4]]))
    assert mask[:4, 0].tolist() == [False, True, True, False]
    assert mask[:4, 1].tolist() == [True, False, False, False]  # ties go to the earlier token
    assert mask[4:, 0].sum() == 0 and mask[4:, 1].all()


def test_expert_choice_counts_per_image():
    assert expert_choice_static(tokens=4, num_experts=2, capacity=1.0) == 2
    logits = torch.tensor([[9.0, -9.0], [9.0, -9.0], [-9.0, -9.0], [9.0, -9.0], *[[-9.0, 9.0]] * 4])
    assert expert_choice_dynamic(predicted_mask(logits, torch.tensor([0.5, 0.5])), 2).tolist() == [[3, 0], [0, 4]]


def test_token_choice_takes_k_and_breaks_ties_by_number():
    scores = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    assert token_choice(scores, 2).tolist() == [[True, True, False, False], [False, False, True, True]]


def test_plan_is_sorted_by_expert_then_token_and_carries_the_gradient():
    scores = torch.rand(5, 3, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    plan = make_plan(mask, scores, num_rows=6)
    assert plan.token_R.tolist() == [0, 2, 4, 2, 0, 3]
    assert plan.row_R.tolist() == [0, 4, 1, 3, 5, 2]
    assert plan.start_T.tolist() == [0, 2, 2, 4, 5, 6]
    plan.weight_R.sum().backward()
    assert torch.equal(scores.grad, mask.float())


def test_quantile_keeps_the_share_that_training_takes():
    logits = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
    threshold = pool_quantile(logits, 250, LocalPool())
    assert (logits.sigmoid() >= threshold).sum(0).tolist() == [250] * 3


def test_capacity_loss_is_mean_binary_cross_entropy():
    logits, mask = torch.zeros(7, 2), torch.ones(7, 2, dtype=torch.bool)
    assert capacity_loss(logits, mask) == pytest.approx(np.log(2))
