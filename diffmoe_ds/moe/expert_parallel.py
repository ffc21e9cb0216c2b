"""The MoE layer with experts sharded over an EP group, as a layer type that DeepSpeed recognizes."""

from __future__ import annotations

import torch.distributed as dist

from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.deepspeed_seam import AutoEPMoELayer, adopt_layer
from diffmoe_ds.moe.dispatch import AllToAllDispatcher
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.moe.pool import GroupPool
from diffmoe_ds.moe.top_k import LocalPool, Pool
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
        is_pool = config.routing.kind == "batch_pool"
        if is_pool and config.routing.pool == "world" and topology.edp_size > 1:
            self.equal_counts_in_training = False  # an expert's K tokens are split unevenly over its replicas
        if topology.ep_size > 1:
            self.counts_known_in_training = is_pool and config.routing.pool == "rank"
            self.dispatcher = AllToAllDispatcher(ep_group, self.counts_known_in_training)
        adopt_layer(self, topology, ep_group)

    def train(self, mode: bool = True) -> ExpertParallelMoE:
        """Switch the mode; only the training rule of ``pool=rank`` routes equal counts to all experts."""
        super().train(mode)
        if isinstance(self.dispatcher, AllToAllDispatcher):
            self.dispatcher.equal_counts = self.counts_known_in_training and mode
        return self


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
