"""Benchmarks, each a script: ``python -m benchmarks.NAME``."""

from diffmoe_ds.cli import configure_torch

configure_torch()  # as for the commands; here, because torch reads the variables when it is imported
