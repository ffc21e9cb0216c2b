"""Train with several configurations in a row; print the live bytes and collectives of each run's last step.

Arguments: a folder, and one JSON list of argument lists of ``diffmoe train``.
"""

import json
import os
import sys

import torch

sys.path.insert(0, os.getcwd())
from diffmoe_ds.cli import main
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.planning.counting import Counter
from diffmoe_ds.training import loop
from tests.helpers.training import wait_for_all_ranks

torch.set_num_threads(1)
train_step = loop.train_step
found = []
folder, runs = sys.argv[1:]
for arguments in json.loads(runs):
    counter = Counter()
    steps = []

    def counted_step(*given, counter=counter, steps=steps):
        counter.reset()
        result = train_step(*given)
        steps.append({"peak": counter.peak, **{kind: t.bytes for kind, t in counter.collectives.items()}})
        return result

    loop.train_step = counted_step
    with counter:
        code = main(["train", *arguments], handle_signals=False)
    assert code == 0, code
    found.append(steps[-1])
    wait_for_all_ranks(folder, f"run {len(found)}")
if os.environ["RANK"] == "0":
    print(json.dumps(found), flush=True)
shutdown(0)
