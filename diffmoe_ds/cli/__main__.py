"""``python -m diffmoe_ds.cli``, for launchers that start a module."""

import sys

from diffmoe_ds.cli import main

sys.exit(main())
