"""The warning about experts without tokens."""

from __future__ import annotations

import pytest
import torch

from diffmoe_ds.training.idle_experts import SHOWN, IdleExperts


def loads(experts: int, *idle: tuple[int, ...]) -> torch.Tensor:
    """The load of each layer, of which these experts have none."""
    load_LE = torch.ones(len(idle), experts, dtype=torch.float64)
    for layer, numbers in enumerate(idle):
        load_LE[layer, list(numbers)] = 0
    return load_LE


def test_an_expert_is_named_once():
    idle = IdleExperts("token_choice")
    first = idle.warning(loads(4, (2,)), [1])
    assert first is not None
    assert first.startswith("no token of this micro-batch, on any rank, went to 1 expert (block 1: 2). ")
    assert "routing.balance_weight and routing.bias_rate" in first and "\n" not in first
    assert idle.warning(loads(4, (2,)), [1]) is None
    assert idle.warning(loads(4, ()), [1]) is None
    assert idle.warning(loads(4, (2,)), [1]) is None, "also after it has had tokens"
    second = idle.warning(loads(4, (0, 2, 3)), [1])
    assert second is not None and "went to 2 experts (block 1: 0, 3). " in second
    assert idle.warning(loads(4, (0, 2, 3)), [1]) is None


def test_several_blocks_are_listed_in_order():
    idle = IdleExperts("token_choice")
    warning = idle.warning(loads(4, (0, 3), (), (1,)), [1, 3, 5])
    assert warning is not None and "went to 3 experts (block 1: 0, 3; block 5: 1). " in warning
    other = idle.warning(loads(4, (0, 3), (0,), (1,)), [1, 3, 5])
    assert other is not None and "went to 1 expert (block 3: 0). " in other, "an expert is known by its block, too"


def test_the_same_expert_of_another_block_is_another_expert():
    idle = IdleExperts("token_choice")
    assert "(block 1: 2)" in (idle.warning(loads(4, (2,)), [1]) or "")
    assert "(block 2: 2)" in (idle.warning(loads(4, (2,)), [2]) or "")


@pytest.mark.parametrize(("number", "more"), ((SHOWN, ""), (SHOWN + 1, " and 1 more"), (20, " and 12 more")))
def test_at_most_eight_experts_of_a_block_are_listed(number, more):
    idle = IdleExperts("token_choice")
    warning = idle.warning(loads(32, tuple(range(1, number + 1)), (0,)), [1, 3])
    assert warning is not None
    assert f"went to {number + 1} experts (block 1: 1, 2, 3, 4, 5, 6, 7, 8{more}; block 3: 0). " in warning
    assert idle.warning(loads(32, tuple(range(1, number + 1)), (0,)), [1, 3]) is None, "also those that it left out"


def test_nothing_is_said_where_nothing_is_idle():
    idle = IdleExperts("token_choice")
    assert idle.warning(loads(4, (), ()), [1, 3]) is None
    assert idle.warning(1e-9 * loads(4, ()), [1]) is None, "few tokens are tokens"
    assert idle.warning(torch.empty(0, 4), []) is None


def test_counts_of_any_dtype_are_accepted():
    for dtype in (torch.int64, torch.float32):
        assert "(block 7: 1, 2)" in (IdleExperts("token_choice").warning(loads(3, (1, 2)).to(dtype), [7]) or "")


def test_the_advice_fits_the_router():
    idle = [[0.0, 1.0]]
    for kind, advice in (
        ("token_choice", "is not trained; routing.balance_weight and routing.bias_rate balance the load."),
        ("expert_race", "is not trained; routing.similarity_weight balances the load."),
        ("expert_choice", "is not trained."),
    ):
        warning = IdleExperts(kind).warning(torch.tensor(idle), [1])
        assert warning is not None and warning.endswith(advice)
