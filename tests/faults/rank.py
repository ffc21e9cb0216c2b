"""One rank of a run under fault injection: ``diffmoe train`` with a run lock that is stale after seconds."""

from __future__ import annotations

import sys

from diffmoe_ds.cli import main
from diffmoe_ds.distributed import run_lock

if __name__ == "__main__":
    run_lock.BEAT_S, run_lock.STALE_S, run_lock.SETTLE_S = 0.25, 3.0, 0.1
    sys.exit(main(["train", *sys.argv[1:]], handle_signals=True))
