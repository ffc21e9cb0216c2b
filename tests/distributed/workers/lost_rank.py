"""Train with one rank that is lost at a given point: it kills or stops itself, hangs, or only takes very long.

Arguments: the rank; ``kill``, ``stop``, ``hang`` or a number of seconds to wait; the point; then those of ``diffmoe``.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from diffmoe_ds.cli import main
from diffmoe_ds.distributed import rendezvous
from diffmoe_ds.training import loop, session

rank, action, point, *arguments = sys.argv[1:]


def strike() -> None:
    print(f"rank {rank}: {action} in process {os.getpid()}", flush=True)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(1000 if action == "hang" else float(action))


def strike_before(owner, name, call=1):
    """Strike before the n-th call of a function."""
    function, calls = getattr(owner, name), []

    def struck(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            strike()
        return function(*args, **kwargs)

    setattr(owner, name, struck)


POINTS = {
    "joined": (session, "Watchdog"),
    "lock": (session.RunLock, "__enter__"),
    "start": (session.TrainPlan, "with_start", 2),  # the first call is before joining
    "group": (session.seam, "init_process_group"),
    "setup": (session, "setup_run"),
    "log": (session, "open_log"),
    "step": (loop, "train_step", 3),
    "save": (loop.Checkpointer, "start"),
    "close": (session.BatchSource, "close"),
}
if action == "hang":
    rendezvous.ANSWER_S = 1.0  # run.start_timeout_s decides
if os.environ["RANK"] == rank:
    strike_before(*POINTS[point])
sys.exit(main(arguments, handle_signals=True))
