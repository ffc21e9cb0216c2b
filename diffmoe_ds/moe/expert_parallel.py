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

    def __init__(
        self,
        config: Config,
        width: int,
        topology: Topology,
        ep_group: dist.ProcessGroup,
        part_of_pool: Pool | None = None,
    ) -> None:
        """Allocate the weights of the experts held here; `model/init.py` sets their values.

        Args:
            config: the run's configuration.
            width: token width D.
            topology: the ranks and the expert placement.
            ep_group: the process group of this rank's EP group.
            part_of_pool: the ranks that share one pool of `routing.pool_images`, if more than one.
        """
        MoELayer.__init__(self, config, width, topology.num_local_experts)
        self.pool = make_pool(config.routing.pool, topology, ep_group)
        self.part_of_pool = part_of_pool
        if topology.ep_size > 1:
            offset, slack = _pool_offset(part_of_pool or self.pool, topology), config.routing.padded_dispatch
            self.dispatcher = AllToAllDispatcher(ep_group, offset)
            if slack is not None:
                self.padded_dispatcher = PaddedAllToAllDispatcher(self.capacity, slack, ep_group, offset)
        adopt_layer(self, topology, ep_group)


def _pool_offset(pool: Pool, topology: Topology) -> int | None:
    """Return the number, in a pool, of the first rank of this rank's EP group; None if the pool lacks the group."""
    return None if pool.size % topology.ep_size else topology.rank % pool.size - topology.ep_rank


def make_pool(scope: str, topology: Topology, ep_group: dist.ProcessGroup) -> Pool:
    """Return the pool of a scope.

    Args:
        scope: ``rank``, ``ep`` or ``world``.
        topology: the ranks.
        ep_group: the process group of this rank's EP group.
    """
    if scope == "world":
        return world_pool(topology)
    if scope == "ep" and topology.ep_size > 1:
        return GroupPool(ep_group)
    return LocalPool()


def world_pool(topology: Topology) -> Pool:
    """Return the pool of all ranks."""
    if topology.world == 1:
        return LocalPool()
    assert dist.group.WORLD is not None
    return GroupPool(dist.group.WORLD)


def make_part_of_pool(
    images: int | None, micro_batch: int | None, topology: Topology, ep_group: dist.ProcessGroup
) -> Pool | None:
    """Return this rank's pool for `routing.pool_images`, if such a pool spans several ranks.

    All ranks must call this.

    Args:
        images: images per pool, `routing.pool_images`; None for a single pool.
        micro_batch: images per rank; None for inference, where all images in a batch compete.
        topology: the ranks.
        ep_group: the process group of this rank's EP group.
    """
    if images is None or micro_batch is None or images <= micro_batch:
        return None
    ranks = images // micro_batch
    if ranks in (topology.world, topology.ep_size):
        return make_pool("world" if ranks == topology.world else "ep", topology, ep_group)
    group, _ = dist.new_subgroups(ranks)
    return GroupPool(group)
