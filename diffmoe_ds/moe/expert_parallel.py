"""The MoE layer whose experts are sharded over an EP group and which DeepSpeed recognises as its own."""

from __future__ import annotations

import torch.distributed as dist

from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.deepspeed_seam import AutoEPMoELayer, adopt_layer
from diffmoe_ds.moe.dispatch import AllToAllDispatcher
from diffmoe_ds.moe.layer import LocalDispatcher, MoELayer
from diffmoe_ds.moe.pool import GroupPool
from diffmoe_ds.moe.top_k import LocalPool, Pool
from diffmoe_ds.topology import Topology


class ExpertParallelMoE(MoELayer, AutoEPMoELayer):
    """`MoELayer` with the pool and the dispatcher of a cluster; the layer's computation is the same."""

    def __init__(self, config: Config, width: int, topology: Topology, ep_group: dist.ProcessGroup) -> None:
        """Build without initial values.

        Args:
            config: the run's configuration.
            width: token width D.
            topology: the ranks and experts.
            ep_group: the process group of this rank's EP group.
        """
        MoELayer.__init__(self, config, width, topology.num_local_experts)
        self.pool = make_pool(config.routing.pool, topology, ep_group)
        is_pool = config.routing.kind == "batch_pool"
        if is_pool and config.routing.pool == "world" and topology.edp_size > 1:
            self.even_in_training = False  # K rows of the world are split over an expert's replicas as they come
        if topology.ep_size > 1:
            self.counts_known_in_training = is_pool and config.routing.pool == "rank"
            self.dispatcher = AllToAllDispatcher(ep_group, even=self.counts_known_in_training)
        else:
            self.dispatcher = LocalDispatcher()
        adopt_layer(self, topology, ep_group)

    def train(self, mode: bool = True) -> ExpertParallelMoE:
        """Switch mode; only the training rule of ``pool=rank`` routes the same number of rows to every expert."""
        super().train(mode)
        if isinstance(self.dispatcher, AllToAllDispatcher):
            self.dispatcher.even = self.counts_known_in_training and mode
        return self


def make_pool(scope: str, topology: Topology, ep_group: dist.ProcessGroup) -> Pool:
    """The pool of a scope: ``rank``, ``ep`` or ``world``."""
    if scope == "world" and topology.world > 1:
        return GroupPool(dist.group.WORLD)
    if scope == "ep" and topology.ep_size > 1:
        return GroupPool(ep_group)
    return LocalPool()
