"""``diffmoe train`` in which one rank computes an infinity at given steps.

    python poison.py WHERE RANK STEP,STEP,... train ...

WHERE is ``gradient`` (of a weight) or ``forward`` (the output of a layer).
"""

import os
import sys

import torch

from diffmoe_ds.cli import main
from diffmoe_ds.training import loop

where, rank, steps = sys.argv[1], int(sys.argv[2]), [int(step) for step in sys.argv[3].split(",")]
train_step, count = loop.train_step, 0


def now() -> bool:
    return count in steps and int(os.environ["RANK"]) == rank


def poison(model):
    if where == "gradient":
        model.blocks[1].mlp.gate_weight.register_hook(lambda g: torch.full_like(g, float("inf")) if now() else g)
    else:
        model.blocks[2].attn.register_forward_hook(lambda m, i, output: output * float("inf") if now() else output)


def counting(run, *arguments):
    global count
    if count == 0:
        poison(run.model)
    count += 1
    return train_step(run, *arguments)


loop.train_step = counting
sys.exit(main(sys.argv[4:], handle_signals=True))
