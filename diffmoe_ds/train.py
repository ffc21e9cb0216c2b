"""Entry script for launchers: ``deepspeed diffmoe_ds/train.py ...`` is the same as ``diffmoe train ...``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the script's directory first on sys.path, where our modules would shadow others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from diffmoe_ds.cli import main

    sys.exit(main(["train", *sys.argv[1:]], handle_signals=True))
