"""Train with one rank whose loader worker is killed.

Arguments: the rank; ``step`` to kill it while the rank trains, ``read`` while it reads; the signal; then those of
``diffmoe``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

from diffmoe_ds.cli import main
from diffmoe_ds.data.reader import Reader
from diffmoe_ds.training.hooks import LogStep

rank, where, number, *arguments = sys.argv[1:]
log, read = LogStep.__call__, Reader.__getitem__


def log_and_kill(self, step):
    log(self, step)
    if self._run.step == 3:
        os.kill(multiprocessing.active_children()[0].pid, int(number))
        time.sleep(0.5)  # the signal that the worker has ended arrives here


def read_and_die(self, task):
    if task.number == 8:  # asked for when two steps are complete: at most four micro-batches are read ahead
        os.kill(os.getpid(), int(number))
    return read(self, task)


if os.environ.get("RANK", "0") == rank:
    if where == "step":
        LogStep.__call__ = log_and_kill
    else:
        Reader.__getitem__ = read_and_die
sys.exit(main(arguments, handle_signals=True))
