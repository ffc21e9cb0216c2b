"""Thresholds of many ranks equal those of one rank with all tokens, exactly, whatever the search near the last key."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.config.schema import RoutingConfig
from diffmoe_ds.moe.thresholds import Thresholds
from diffmoe_ds.moe.top_k import LocalPool
from tests.unit.test_routing import on_ranks

EXPERTS, TOKENS = 3, 240


def logits_of_steps(ranks: int) -> list[torch.Tensor]:
    """Logits [micro-batches, layers, ranks, T, E] of each step."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 1, 1, 2, 2, 1, 1, 1]  # micro-batches
    steps = [torch.randn(m, 2, ranks, TOKENS, EXPERTS, generator=generator) for m in sizes]
    steps[2] *= 1.1
    steps[6] = steps[6] * 1e-3 + 5  # a jump to nearly equal numbers
    return steps


def train(part, pool, world, send):
    """Return the thresholds after each step, the messages of each search, and which had to be repeated."""
    layers = [
        SimpleNamespace(capacity_predictor=True, pool=pool, num_experts=EXPERTS, expert_threshold=torch.zeros(EXPERTS))
        for _ in range(2)
    ]
    thresholds = Thresholds(layers, RoutingConfig(capacity=1.0, threshold_decay=0.5), world)
    found, messages, repeats = [], [], []
    for step in part:
        before = getattr(pool, "messages", 0)
        for micro_batch in step:
            thresholds.observe([SimpleNamespace(capacity_logits_TE=logits) for logits in micro_batch])
        verdict = thresholds.search()
        messages.append(getattr(pool, "messages", 0) - before)
        verdict = torch.zeros(()) if verdict is None else verdict
        repeats.append(bool(send(verdict[None]).mean() > 0))
        attachment = thresholds.attachment
        thresholds.update(repeats[-1], None if attachment is None else send(attachment))
        assert thresholds.attachment is None
        found.append(torch.stack([layer.expert_threshold.clone() for layer in layers]))
    return torch.stack(found), messages, repeats


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("is_pool_of_all", (True, False))
def test_thresholds_do_not_depend_on_the_ranks(ranks, is_pool_of_all):
    steps = logits_of_steps(ranks)
    expected, *_ = train([step.flatten(2, 3) for step in steps], LocalPool(), 1, lambda values: values[None])
    parts = [[step[:, :, rank] for step in steps] for rank in range(ranks)]
    world = ranks if is_pool_of_all else 2 * ranks
    for found, messages, repeats in on_ranks(lambda part, pool: train(part, pool, world, pool.stack), parts):
        assert torch.equal(found, expected)
        warm = 1 if is_pool_of_all else 2
        assert messages == [4, warm, warm, 4, warm, 4, warm, warm]  # cold after a change of the micro-batches
        assert repeats == [False] * 6 + [True, False]
