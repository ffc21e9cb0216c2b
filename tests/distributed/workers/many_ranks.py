"""Let many ranks join in one process, with a low limit of open files.

Arguments: the number of ranks, and a free port. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading

from benchmarks.rendezvous import count_connections, run_ranks

world, port = map(int, sys.argv[1:])
limit = len(os.listdir("/proc/self/fd")) + world
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
found = {"limit_before": limit, "connections": 0, "open_files": 0}
done = threading.Event()


def look() -> None:
    while not done.wait(0.05):
        found["connections"] = max(found["connections"], count_connections(port))
        found["open_files"] = max(found["open_files"], len(os.listdir("/proc/self/fd")))


looker = threading.Thread(target=look)
looker.start()
run_ranks(range(world), world, port, watch_s=0.5)
done.set()
looker.join()
print(json.dumps({**found, "limit_after": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}), flush=True)
