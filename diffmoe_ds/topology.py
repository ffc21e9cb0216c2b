"""The ranks of a run and the expert placement.

World W = EP size P x expert replicas EDP. EP groups are consecutive ranks: rank r is number r % P of group r // P and
holds experts [r % P * E / P, (r % P + 1) * E / P).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffmoe_ds.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """This rank's place among the ranks and experts."""

    rank: int
    """This process, from 0."""
    world: int
    """Number of ranks W."""
    ep_size: int
    """Ranks P that share one set of experts."""
    num_experts: int
    """Experts E of a MoE layer."""

    def __post_init__(self) -> None:
        """Check that the sizes are compatible.

        Raises:
            TopologyError: P does not divide both W and E.
        """
        if self.ep_size < 1 or self.world % self.ep_size or self.num_experts % self.ep_size:
            valid = [p for p in range(1, self.world + 1) if self.world % p == 0 and self.num_experts % p == 0]
            raise TopologyError(
                f"expert_parallel.autoep_size must divide both the {self.world} rank(s) and the {self.num_experts} "
                f"expert(s), got {self.ep_size}; valid: {', '.join(map(str, valid))}."
            )

    @property
    def edp_size(self) -> int:
        """Number of replicas of each expert."""
        return self.world // self.ep_size

    @property
    def ep_rank(self) -> int:
        """This rank's number in its EP group."""
        return self.rank % self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Number of experts held by a rank."""
        return self.num_experts // self.ep_size

    @property
    def first_expert(self) -> int:
        """Global index of the first expert held here."""
        return self.ep_rank * self.num_local_experts


def check_world(name: str, world: int) -> None:
    """Check a number of ranks that the user chose.

    Args:
        name: the option or key, for the message.
        world: its value.

    Raises:
        TopologyError: the number is not positive.
    """
    if world < 1:
        raise TopologyError(f"{name} must be a positive number of ranks, got {world}.")


def largest_ep_size(num_experts: int, world: int, local_world: int) -> int:
    """Return the EP size that ``"auto"`` stands for: the largest that divides experts, world and ranks per host.

    Args:
        num_experts: E.
        world: number of ranks W.
        local_world: ranks on this host.
    """
    return math.gcd(num_experts, world, local_world)
