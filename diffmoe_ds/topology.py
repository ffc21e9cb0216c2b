"""The ranks of a run and how experts lie on them.

World W = EP size P x expert replicas EDP.  EP groups are consecutive ranks: rank r is number r % P of group
r // P and holds experts [r % P * E / P, (r % P + 1) * E / P).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffmoe_ds.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """Where this rank stands."""

    rank: int
    """This process, from 0."""
    world: int
    """Number of ranks W."""
    ep_size: int
    """Ranks P that share one set of experts."""
    num_experts: int
    """Experts E of a MoE layer."""

    def __post_init__(self) -> None:
        """TopologyError unless P divides both W and E."""
        if self.ep_size < 1 or self.world % self.ep_size or self.num_experts % self.ep_size:
            valid = [p for p in range(1, self.world + 1) if self.world % p == 0 and self.num_experts % p == 0]
            raise TopologyError(
                f"expert_parallel.autoep_size is {self.ep_size}, but it must divide both the {self.world} rank(s) and "
                f"the {self.num_experts} expert(s); valid: {', '.join(map(str, valid))}."
            )

    @property
    def edp_size(self) -> int:
        """Replicas of each expert."""
        return self.world // self.ep_size

    @property
    def ep_rank(self) -> int:
        """This rank's number in its EP group."""
        return self.rank % self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Experts that a rank holds."""
        return self.num_experts // self.ep_size

    @property
    def first_expert(self) -> int:
        """Global number of the first expert held here."""
        return self.ep_rank * self.num_local_experts


def check_world(name: str, world: int) -> None:
    """TopologyError unless a number of ranks that a user gave is one."""
    if world < 1:
        raise TopologyError(f"{name} is {world}, but it must be a positive number of ranks.")


def largest_ep_size(num_experts: int, world: int, local_world: int) -> int:
    """What ``"auto"`` means: shard over as many ranks of one host as divide the experts and the world."""
    return math.gcd(num_experts, world, local_world)
