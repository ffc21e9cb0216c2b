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
step, make_watch, count = loop._step, loop.GradientWatch, 0


def now() -> bool:
    return count in steps and int(os.environ["RANK"]) == rank


def counting(*arguments):
    global count
    count += 1
    return step(*arguments)


def poisoned_model(model):
    """Before the watch, so that it sees what the hooks make."""
    if where == "gradient":
        model.blocks[1].mlp.gate_weight.register_hook(lambda g: torch.full_like(g, float("inf")) if now() else g)
    else:
        model.blocks[2].attn.register_forward_hook(lambda m, i, output: output * float("inf") if now() else output)
    return make_watch(model)


loop._step, loop.GradientWatch = counting, poisoned_model
sys.exit(main(sys.argv[4:]))
