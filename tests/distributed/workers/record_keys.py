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
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.session import Session

taken: list[str] = []
take = BatchSource.take
open_batches = Session.open_batches


def opening(session, run):
    batches = open_batches(session, run)
    batches.run, batches.dataset = run, session.plan.dataset
    return batches


def recording(batches):
    batch = take(batches)
    for position in batch.position.tolist():
        taken.append(batches.dataset[sample_index(batches.run.config.run.seed, position, len(batches.dataset))].key)
    return batch


Session.open_batches, BatchSource.take = opening, recording
folder = Path(sys.argv[1])
code = main(sys.argv[2:])
if code == 0:
    folder.mkdir(exist_ok=True)
    (folder / f"{len(list(folder.iterdir())):03d}-{os.environ['RANK']}-{os.getpid()}").write_text(" ".join(taken))
sys.exit(code)
