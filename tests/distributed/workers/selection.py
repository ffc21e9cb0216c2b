"""On each rank: the exact selection over real process groups, counting every byte sent."""

import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, os.getcwd())
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.moe.pool import GroupPool
from diffmoe_ds.moe.search import WarmStart
from diffmoe_ds.moe.top_k import select_top_k
from tests.unit.test_routing import PALETTES, gather_and_sort

sent = 0


def counted(function, tensor_of):
    def wrapper(*args, **kwargs):
        global sent
        tensor = tensor_of(args)
        sent += tensor.numel() * tensor.element_size()
        return function(*args, **kwargs)

    return wrapper


for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast", "reduce"):
    position = 1 if name.startswith("all_") and name != "all_reduce" else 0
    setattr(dist, name, counted(getattr(dist, name), lambda args, p=position: args[p]))

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
pool = GroupPool(dist.group.WORLD)
checked = 0
warm = WarmStart()  # of other scores each time
for palette in sorted(PALETTES):
    for tokens in (1, 33):
        generator = np.random.default_rng(tokens)
        total = tokens * world
        if PALETTES[palette] is None:
            values = generator.standard_normal((total, 4)) + 1e9 * (np.arange(total)[:, None] < tokens)
        else:
            values = generator.choice(np.array(PALETTES[palette], dtype=np.float32), (total, 4))
        scores = torch.from_numpy(values.astype(np.float32))
        for k in ([0, 1, total // 2, total], [total, 0, total - 1, 1]):
            mine = select_top_k(scores[rank * tokens : (rank + 1) * tokens], torch.tensor(k), pool, warm).mask_TE
            every = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(every, mine)
            assert torch.equal(torch.cat(every), gather_and_sort(scores, torch.tensor(k))), (palette, tokens, k)
            checked += 1
traffic = []
for tokens in (1_000, 100_000):
    scores = torch.rand(tokens, 8)
    sent = 0
    select_top_k(scores, torch.full((8,), tokens * world // 8), pool)
    traffic.append(sent)
if rank == 0:
    print(json.dumps({"checked": checked, "traffic": traffic}))
del pool  # it holds the process group
shutdown(0)
