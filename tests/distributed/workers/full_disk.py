"""``diffmoe train`` in which one rank finds the disk full whenever it writes its part of a checkpoint.

python full_disk.py RANK train ...
"""

import errno
import os
import sys

from diffmoe_ds.checkpoint import save
from diffmoe_ds.cli import main


def full(path, *_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


if os.environ["RANK"] == sys.argv[1]:
    save.write_safetensors = full
sys.exit(main(sys.argv[2:], handle_signals=True))
