"""``diffmoe train`` that records what each rank reads of a checkpoint, and what is open once the run is set up.

python recorded_reads.py FOLDER FAILING train ...

Reading fails on the rank FAILING (none: -1). Each rank writes FOLDER/RANK.json: the bytes that it read of every file,
and the open or mapped files of checkpoints.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from diffmoe_ds.checkpoint.tensor_file import TensorFile
from diffmoe_ds.cli import main
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.training import session

FOLDER, FAILING, RANK = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
read, setup_run = TensorFile.read, session.setup_run
sizes: Counter[str] = Counter()


def recorded_read(self, offset, out, *rest):
    if RANK == FAILING:
        raise CheckpointError(f"{self.path}: cannot be read: Input/output error.")
    sizes[self.path.name] += out.nbytes
    read(self, offset, out, *rest)


def recorded_setup(*arguments):
    run = setup_run(*arguments)
    handles = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    held = [line for line in (*handles, *mapped) if "/checkpoints/" in line]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{RANK}.json").write_text(json.dumps({"read": sizes, "held": held}))
    return run


TensorFile.read, session.setup_run = recorded_read, recorded_setup
sys.exit(main(sys.argv[3:], handle_signals=True))
