"""A warning about experts that take no tokens: they cost memory, and are never trained.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffmoe_ds.text import counted

ADVICE = {
    "token_choice": "; routing.balance_weight and routing.bias_rate balance the load",
    "expert_race": "; routing.similarity_weight balances the load",
}
"""What helps, by ``routing.kind``."""
SHOWN = 8
"""Largest number of experts that a warning names in a block."""


class IdleExperts:
    """Names each expert once."""

    def __init__(self, kind: str) -> None:
        """Start without an idle expert.

        Args:
            kind: ``routing.kind``, for the advice.
        """
        self._advice = ADVICE.get(kind, "")
        self._named: set[tuple[int, int]] = set()

    def warning(self, load_LE: Tensor, blocks: Sequence[int]) -> str | None:
        """Return a sentence on experts without tokens that have not been named yet.

        Args:
            load_LE: how many tokens each expert takes, in any unit.
            blocks: the block of each MoE layer.
        """
        idle: dict[int, list[int]] = {}
        for layer, expert in (load_LE == 0).nonzero().tolist():
            if (blocks[layer], expert) not in self._named:
                idle.setdefault(blocks[layer], []).append(expert)
        if not idle:
            return None
        self._named |= {(block, expert) for block, experts in idle.items() for expert in experts}
        places = "; ".join(f"block {block}: {_listed(experts)}" for block, experts in idle.items())
        number = sum(map(len, idle.values()))
        return (
            f"no token of this micro-batch, on any rank, went to {counted(number, 'expert')} ({places}). Without "
            f"tokens an expert is not trained{self._advice}."
        )


def _listed(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:SHOWN]))
    return shown if len(experts) <= SHOWN else f"{shown} and {len(experts) - SHOWN} more"
