"""``diffmoe train`` that records the key of every image it trains on.

    python record_keys.py FOLDER train ...

Images that were prefetched but not trained on do not count, so keys are recorded where the loop takes a micro-batch,
and written if the run succeeds.
"""

import os
import sys
from pathlib import Path

from diffmoe_ds.cli import main
from diffmoe_ds.data.shuffle import sample_index
from diffmoe_ds.training import batches

taken: list[str] = []
make_loader = batches.make_loader


def recording(run, dataset):
    for batch in make_loader(run, dataset):
        for position in batch.position.tolist():
            index = sample_index(run.config.run.seed, position, len(dataset))
            taken.append(dataset[index].key)
        yield batch


batches.make_loader = recording
folder = Path(sys.argv[1])
code = main(sys.argv[2:])
if code == 0:
    folder.mkdir(exist_ok=True)
    (folder / f"{len(list(folder.iterdir())):03d}-{os.environ['RANK']}-{os.getpid()}").write_text(" ".join(taken))
sys.exit(code)
