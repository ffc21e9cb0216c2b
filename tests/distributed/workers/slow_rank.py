"""Train with one rank that is slow between collectives, on two simulated hosts; count the bytes sent between them."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist

from diffmoe_ds.cli import main
from diffmoe_ds.distributed import rendezvous
from diffmoe_ds.training import loss as loss_module

RANK = int(os.environ["RANK"])
SLOW_RANK, SLOW_S = 1, 0.05
rendezvous.socket.gethostname = lambda: f"host{RANK}"

loss, exchange = loss_module.training_loss, dist.all_to_all_single
crossed = 0


def slow_loss(*arguments):
    if RANK == SLOW_RANK:
        time.sleep(SLOW_S)
    return loss(*arguments)


def counted(out, data, received=None, sent=None, group=None, **options):
    global crossed
    if sent is not None:  # rows, not their counts
        row = data[0].numel() * data.element_size() if len(data) else 0
        crossed += sum(count for rank, count in enumerate(sent) if rank != dist.get_rank(group)) * row
    return exchange(out, data, received, sent, group=group, **options)


loss_module.training_loss, dist.all_to_all_single = slow_loss, counted
code = main(["train", *sys.argv[1:]])
print(f"rank {RANK} sent {crossed} bytes to others", flush=True)
sys.exit(code)
