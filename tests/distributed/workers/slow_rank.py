"""Train with one rank that is slow between collectives, on two simulated hosts; count the bytes sent between them.

The clock is the CPU time and what the slow rank and collectives add to it, so that a busy machine does not matter.
"""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist

from diffmoe_ds.cli import main
from diffmoe_ds.distributed import collectives, rendezvous, stragglers
from diffmoe_ds.training import loss as loss_module

RANK = int(os.environ["RANK"])
SLOW_RANK, SLOW_S = 1, 0.05
rendezvous.socket.gethostname = lambda: f"host{RANK}"

loss, exchange, all_reduce = loss_module.training_loss, dist.all_to_all_single, dist.all_reduce
crossed, passed_s = 0, 0.0


def slow_loss(*arguments):
    global passed_s
    if RANK == SLOW_RANK:
        passed_s += SLOW_S
    return loss(*arguments)


def slow_all_reduce(*arguments, **options):
    global passed_s
    passed_s += SLOW_S
    return all_reduce(*arguments, **options)


def counted(out, data, received=None, sent=None, group=None, **options):
    global crossed
    if sent is not None:  # rows, not their counts
        row = data[0].numel() * data.element_size() if len(data) else 0
        crossed += sum(count for rank, count in enumerate(sent) if rank != dist.get_rank(group)) * row
    return exchange(out, data, received, sent, group=group, **options)


collectives.now = stragglers.now = lambda: time.thread_time() + passed_s
loss_module.training_loss, dist.all_to_all_single, dist.all_reduce = slow_loss, counted, slow_all_reduce
code = main(["train", *sys.argv[1:]])
print(f"rank {RANK} sent {crossed} bytes to others", flush=True)
sys.exit(code)
