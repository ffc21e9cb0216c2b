"""Train a few steps in several layouts; print, for a step once the search is warm, what it waits for and sends.

python counting.py FOLDER CASE...

The folder contains zero2.json and zero3.json, DeepSpeed configurations. The cases are names of `CASES`.
"""

import json
import os
import sys
from contextlib import ExitStack

sys.path.insert(0, os.getcwd())
import torch.distributed as dist

from diffmoe_ds.cli import main
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.training import loop
from tests.helpers.counting import HostWaits, counted_collectives
from tests.helpers.training import wait_for_all_ranks

CASES = {
    "pool=rank": ["routing.pool=rank"],
    "pool=world": ["routing.pool=world"],
    "pool=world, recomputed": ["routing.pool=world", "model.activation_checkpointing=true"],
    "expert_choice": ["routing.kind=expert_choice"],
    "pool=world, padded": ["routing.pool=world", "routing.padded_dispatch=1.5"],
    "pool=world, overflowing": ["routing.pool=world", "routing.padded_dispatch=1"],
    "token_choice": ["routing.kind=token_choice"],
    "token_choice, padded": ["routing.kind=token_choice", "routing.padded_dispatch=4"],
    "ZeRO 3": ["routing.pool=world"],
    "ZeRO 3, padded": ["routing.pool=world", "routing.padded_dispatch=1.18", "model.activation_checkpointing=true"],
}
MODEL = ["model.name=nano-E4", "model.patch_size=4"]
STEPS = 4
train_step, forward = loop.train_step, MoELayer.forward
folder, *chosen = sys.argv[1:]
rank, results = int(os.environ["RANK"]), {}
step, layer_calls = 0, []


def counting_step(run, *arguments):
    global step
    step += 1
    if step < STEPS:
        return train_step(run, *arguments)
    with ExitStack() as stack:
        waits, calls = stack.enter_context(HostWaits()), stack.enter_context(counted_collectives())

        def counting_forward(layer, *inputs):
            before = calls.copy()
            out = forward(layer, *inputs)
            layer_calls.append(dict(calls - before))
            return out

        MoELayer.forward = counting_forward
        stack.callback(setattr, MoELayer, "forward", forward)
        result = train_step(run, *arguments)
    results[name] = {"waits": dict(waits.places), "step": dict(calls), "layers": layer_calls.copy()}
    return result


loop.train_step = counting_step
for name in chosen:
    step, layer_calls = 0, []
    sets = [f"run.total_images={STEPS * 16}", "run.save_every_images=0", *MODEL, *CASES[name]]
    deepspeed = f"{folder}/{'zero3' if name.startswith('ZeRO 3') else 'zero2'}.json"
    arguments = ["train", "--deepspeed_config", deepspeed, "--run-dir", f"{folder}/{name}"]
    code = main([*arguments, *(part for value in sets for part in ("--set", value))])
    assert code == 0, (name, code)
    assert not dist.is_initialized()
    wait_for_all_ranks(folder, name)
if rank == 0:
    print("counted " + json.dumps(results), flush=True)
