"""The script that launchers start: ``deepspeed diffmoe_ds/train.py ...``.  The same as ``diffmoe train``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on the path, and ours holds modules with common names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from diffmoe_ds.cli import main

    sys.argv.insert(1, "train")
    sys.exit(main())
