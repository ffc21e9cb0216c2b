"""The MoE layer with experts sharded over an EP group, as a layer type that DeepSpeed recognizes."""

from __future__ import annotations

import torch.distributed as dist

from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.deepspeed_seam import AutoEPMoELayer, adopt_layer
from diffmoe_ds.moe.dispatch import AllToAllDispatcher, PaddedAllToAllDispatcher
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.moe.pool import GroupPool
from diffmoe_ds.moe.search import Pool
from diffmoe_ds.moe.top_k import LocalPool
from diffmoe_ds.topology import Topology


class ExpertParallelMoE(MoELayer, AutoEPMoELayer):  # type: ignore[misc]  # DeepSpeed has no types
    """`MoELayer` with the pool and the dispatcher of a cluster; the computation is inherited unchanged."""

    def __init__(self, config: Config, width: int, topology: Topology, ep_group: dist.ProcessGroup) -> None:
        """Allocate the weights of the experts held here; `model/init.py` sets their values.

        Args:
            config: the run's configuration.
            width: token width D.
            topology: the ranks and the expert placement.
            ep_group: the process group of this rank's EP group.
        """
        MoELayer.__init__(self, config, width, topology.num_local_experts)
        self.pool = make_pool(config.routing.pool, topology, ep_group)
        if topology.ep_size > 1:
            offset, slack = _pool_offset(self.pool, topology), config.routing.padded_dispatch
            self.dispatcher = AllToAllDispatcher(ep_group, offset)
            if slack is not None:
                self.padded_dispatcher = PaddedAllToAllDispatcher(self.capacity, slack, ep_group, offset)
        adopt_layer(self, topology, ep_group)


def _pool_offset(pool: Pool, topology: Topology) -> int | None:
    """Return the number, in a pool, of the first rank of this rank's EP group; None if the pool lacks the group."""
    return {topology.world: topology.rank - topology.ep_rank, topology.ep_size: 0}.get(pool.size)


def make_pool(scope: str, topology: Topology, ep_group: dist.ProcessGroup) -> Pool:
    """Return the pool of a scope.

    Args:
        scope: ``rank``, ``ep`` or ``world``.
        topology: the ranks.
        ep_group: the process group of this rank's EP group.
    """
    if scope == "world" and topology.world > 1:
        assert dist.group.WORLD is not None
        return GroupPool(dist.group.WORLD)
    if scope == "ep" and topology.ep_size > 1:
        return GroupPool(ep_group)
    return LocalPool()
