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
from diffmoe_ds.distributed.watchdog import Watchdog

rank, where, *arguments = sys.argv[1:]
start_worker, read, enter = loader._start_worker, Reader.__getitem__, Watchdog.__enter__


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


def enter_and_wait(self):
    for _ in range(1000):  # as if saving had taken this rank longer: it is still the one that is behind
        self.alive()
    return enter(self)


if os.environ["RANK"] == rank:
    Watchdog.__enter__ = enter_and_wait
    loader._start_worker = start
    if where != "start":
        Reader.__getitem__ = item
sys.exit(main(arguments, handle_signals=True))
