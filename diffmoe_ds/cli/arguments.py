"""Types and checks of options that several commands and benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe_ds.errors import ConfigError

MAX_NUMBER = 10_000_000
"""Largest number that an option accepts, such as a number of images."""
LARGEST = {"batch_size": 65_536, "size": 16_384, "steps": 100_000, "threads": 1_024, "world": 1 << 20}
"""Largest numbers of other options."""


def nonempty(text: str) -> str:
    """Return the value of an option that must not be empty, for ``type=``; an unset shell variable makes it empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def nonempty_path(text: str) -> Path:
    """Return a path, for ``type=``; ``Path("")`` would be the current directory."""
    return Path(nonempty(text))


OPTIONS = {"per_class": "--per-class or --per-prompt"}
"""Attribute -> its options, if there are several."""


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Check numeric options, skipping those that a subcommand does not have or that are not set.

    Args:
        args: the parsed options.
        names: attributes of ``args``, such as ``batch_size`` for ``--batch-size``.

    Raises:
        ConfigError: an option is less than 1, or so large that the command could never finish.
    """
    for name in names:
        value, option = getattr(args, name, 1), OPTIONS.get(name, f"--{name.replace('_', '-')}")
        if value is not None and not value >= 1:
            raise ConfigError(f"{option} must be positive, got {value}.")
        most = LARGEST.get(name, MAX_NUMBER)
        if value is not None and value > most:
            raise ConfigError(f"{option} must be at most {most:,}, got {value:,}.")
