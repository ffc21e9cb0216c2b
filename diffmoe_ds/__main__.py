"""Run ``diffmoe`` as ``python -m diffmoe_ds``."""

import sys

from diffmoe_ds.cli import main

sys.exit(main())
