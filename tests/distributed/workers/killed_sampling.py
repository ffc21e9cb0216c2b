"""``diffmoe sample`` in which one rank is killed after it has written some shards; before the process group if 0.

python killed_sampling.py RANK SHARDS sample ...
"""

import os
import signal
import sys

from diffmoe_ds.cli import main, sample_run
from diffmoe_ds.distributed import lost_ranks
from diffmoe_ds.sampling.unfinished import UnfinishedSet

write, shards = UnfinishedSet.write, int(sys.argv[2])


def write_and_die(*arguments):
    global shards
    write(*arguments)
    shards -= 1
    if shards == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if shards == 0:
    lost_ranks.SILENT_S = 10.0
if os.environ["RANK"] == sys.argv[1]:
    if shards == 0:
        sample_run.create_groups = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    UnfinishedSet.write = write_and_die
sys.exit(main(sys.argv[3:], handle_signals=True))
