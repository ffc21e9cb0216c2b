"""Train with one rank whose loader worker stops responding.

Arguments: the rank; ``start`` or the number of a micro-batch; then those of ``diffmoe``.
"""

from __future__ import annotations

import os
import signal
import sys

from diffmoe_ds.cli import main
from diffmoe_ds.data import loader
from diffmoe_ds.data.reader import Reader

rank, where, *arguments = sys.argv[1:]
start_worker, read = loader._start_worker, Reader.__getitem__


def block():
    print(f"worker {os.getpid()} is stuck", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        signal.pause()


def start(*arguments):
    start_worker(*arguments)
    if where == "start":
        block()


def item(self, task):
    if task.number == int(where):
        block()
    return read(self, task)


if os.environ["RANK"] == rank:
    loader._start_worker = start
    if where != "start":
        Reader.__getitem__ = item
sys.exit(main(arguments, handle_signals=True))
