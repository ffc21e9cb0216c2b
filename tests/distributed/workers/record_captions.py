"""``diffmoe train`` that records the text features of every image it trains on.

    python record_captions.py FOLDER train ...

Each rank that succeeds writes a JSON object to FOLDER: for each position, whether its caption is dropped, and the
features as hexadecimal text.
"""

import json
import os
import sys
from pathlib import Path

from diffmoe_ds.cli import main
from diffmoe_ds.training.batches import BatchSource

taken: dict[int, tuple[bool, str]] = {}
take = BatchSource.take


def recording(batches):
    batch = take(batches)
    rows = [row.numpy().tobytes().hex() for row in batch.text]
    taken.update(zip(batch.position.tolist(), zip(batch.drop.tolist(), rows, strict=True), strict=True))
    return batch


BatchSource.take = recording
folder = Path(sys.argv[1])
code = main(sys.argv[2:])
if code == 0:
    folder.mkdir(exist_ok=True)
    (folder / f"{os.environ['RANK']}-{os.getpid()}.json").write_text(json.dumps(taken))
sys.exit(code)
