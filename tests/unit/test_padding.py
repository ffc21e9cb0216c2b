"""Padded dispatch: the same outputs and gradients as with exact counts, and a flag where rows are lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.moe.experts import Experts
from diffmoe_ds.moe.layer import MoELayer, exact_dispatch
from diffmoe_ds.moe.padding import PaddedDispatcher, _positions
from diffmoe_ds.moe.plan import Dispatcher, LocalDispatcher
from diffmoe_ds.moe.rows import combine_rows, gather_rows
from diffmoe_ds.moe.top_k import Selection

WIDTH = 8


def results(
    dispatcher: Dispatcher, mask_TE: torch.Tensor, is_grouped: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The output and all gradients of a dispatch, and its flag."""
    generator = torch.Generator().manual_seed(1)
    tokens, experts = mask_TE.shape
    x = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    scores = torch.rand(tokens, experts, generator=generator, requires_grad=True)
    ffn = Experts("gelu", experts, WIDTH, 2 * WIDTH)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    counts = dispatcher.count(Selection(mask_TE), is_grouped)
    plan = counts.plan(mask_TE, scores)
    rows = ffn(dispatcher.start_dispatch(gather_rows(x, plan), counts)(), counts.of_local_experts)
    out = combine_rows(dispatcher.combine(rows, counts), plan)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), x.grad, scores.grad, *(p.grad for p in ffn.parameters())], counts.overflow


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from([1.0, 1.25, 2.0]),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
@example(39, 3, 0.5, 1.25, 39, True)  # a gradient of 0.003 is the sum of terms a thousand times as large
def test_padding_changes_nothing_unless_it_overflows(tokens, experts, density, slack, seed, grouped):
    """Whether experts compute the padding, or grouped products whose sizes only the device knows."""
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density
    capacity = max(0.1, density * experts)
    padded, overflow = results(PaddedDispatcher(capacity, slack), mask, grouped)
    assert all(tensor.isfinite().all() for tensor in padded)
    slots = min(tokens, math.ceil(capacity * slack * tokens / experts))
    assert bool(overflow) == bool((mask.sum(0) > slots).any())
    if not overflow:
        exact, never = results(LocalDispatcher(), mask)
        assert never is None
        for ours, expected in zip(padded, exact, strict=True):
            rounding = 1e-6 * (1 + float(expected.abs().max()))  # of the terms of a sum, which may cancel
            torch.testing.assert_close(ours, expected, atol=rounding, rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_received_rows_are_ordered_by_expert_then_rank(ranks, experts, slots, seed):
    """Every expert gets the same number of rows, whatever each rank sends."""
    generator = torch.Generator().manual_seed(seed)
    total = int(torch.randint(1, ranks * slots + 1, (), generator=generator))
    chosen = [torch.randperm(ranks * slots, generator=generator)[:total] for _ in range(experts)]
    received_PL = torch.stack([torch.bincount(c // slots, minlength=ranks) for c in chosen], dim=1)
    slot_R, row_R = _positions(received_PL, slots, experts * total)
    expected = [
        (rank * experts + expert) * slots + number
        for expert in range(experts) for rank in range(ranks) for number in range(received_PL[rank, expert])
    ]  # fmt: skip
    assert slot_R.tolist() == expected
    assert torch.equal(row_R[slot_R], torch.arange(experts * total))
    assert row_R.min() >= 0 and row_R.max() < experts * total


def test_positions_are_valid_even_for_a_wrong_selection():
    """An unverified search may be wrong; the pass is then repeated, but it must not read beyond its tensors."""
    for received_PL in (torch.tensor([[0, 9], [0, 0]]), torch.tensor([[0, 0], [0, 0]]), torch.tensor([[7, 7], [7, 7]])):
        slot_R, row_R = _positions(received_PL, 3, 10)
        assert slot_R.shape == (10,) and slot_R.min() >= 0 and slot_R.max() < 12
        assert row_R.shape == (12,) and row_R.min() >= 0 and row_R.max() < 10


def layer(*overrides: str) -> MoELayer:
    model = DiT(load_config("fashion", ["model.name=nano-E4", "model.depth=2", *overrides]))
    init_weights(model, 0)
    return model.moe_layers()[1].train()


def test_a_layer_pads_only_in_training_and_where_the_rule_fixes_no_sizes():
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens = layer("routing.kind=token_choice", "routing.padded_dispatch=4")
    assert tokens(x)[1].must_redo.item() is False
    with exact_dispatch([tokens]):
        assert tokens(x)[1].must_redo is None
    assert tokens.eval()(x)[1].must_redo is None
    assert layer("routing.kind=token_choice")(x)[1].must_redo is None
    assert layer("routing.kind=batch_pool", "routing.padded_dispatch=4")(x)[1].must_redo is None


def test_a_layer_says_that_rows_were_lost():
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)).expand(2, 64, 32)
    tight = layer("routing.kind=token_choice", "routing.padded_dispatch=1")
    with torch.no_grad():
        tight.gate_weight.zero_()  # all tokens go to the first expert
    assert tight(x)[1].must_redo.item() is True


def test_slack_below_one_is_rejected():
    with pytest.raises(ConfigError, match=r"routing\.padded_dispatch must be at least 1, got 0\.9"):
        load_config("fashion", ["routing.padded_dispatch=0.9"])
