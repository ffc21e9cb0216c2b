"""Process groups without processes: collectives that move no data, for simulating one rank of a large world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffmoe_ds.topology import Topology


@contextmanager
def fake_ranks(topology: Topology) -> Iterator[dist.ProcessGroup]:
    """Create the world of ``topology`` and this rank's EP group from fake groups, and destroy them at the end.

    The process must not be in a process group already.

    Yields:
        The EP group.
    """
    assert not dist.is_initialized(), "a simulation needs a process without process groups"
    dist.init_process_group("fake", rank=topology.rank, world_size=topology.world, store=FakeStore())
    try:
        first = topology.rank - topology.ep_rank
        yield dist.new_group(list(range(first, first + topology.ep_size)), backend="fake")
    finally:
        dist.destroy_process_group()
