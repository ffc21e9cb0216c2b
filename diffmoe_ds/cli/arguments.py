"""Types and checks of options that several commands and benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe_ds.errors import ConfigError


def nonempty(text: str) -> str:
    """Return the value of an option that must not be empty, for ``type=``; an unset shell variable makes it empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def nonempty_path(text: str) -> Path:
    """Return a path, for ``type=``; ``Path("")`` would be the current directory."""
    return Path(nonempty(text))


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Check numeric options, skipping those that a subcommand does not have or that are not set.

    Args:
        args: the parsed options.
        names: attributes of ``args``, such as ``batch_size`` for ``--batch-size``.

    Raises:
        ConfigError: an option is less than 1.
    """
    for name in names:
        value = getattr(args, name, 1)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {value}.")
