"""Elastic launches, ``torchrun --nnodes MIN:MAX``: train on as many of the ranks as the configuration allows.

After a node was lost, torchrun restarts the remaining ranks. If their number does not divide the batch or fit the
experts, the last ones are surplus: they wait (`diffmoe_ds.distributed.surplus`) until the run ends or torchrun restarts
all ranks, for example because the node is back.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import ConfigError

T = TypeVar("T")


def fit_ranks(launch: Launch, resolve: Callable[[Launch], T]) -> tuple[Launch, T]:
    """Resolve a configuration for as many of the ranks as it is valid for; for all of them if the launch isn't elastic.

    Args:
        launch: from `resolve_launch`.
        resolve: returns the configuration for a number of ranks; raises ConfigError if it is invalid for it.

    Returns:
        The launch, with the other ranks as its surplus, and the configuration.

    Raises:
        ConfigError: the configuration is invalid; the error is that for all ranks.
    """
    try:
        return launch, resolve(launch)
    except ConfigError:
        if not is_elastic():
            raise
        for world in range(launch.world - 1, 0, -1):
            fewer = with_ranks(launch, world)
            try:
                return fewer, resolve(fewer)
            except ConfigError:
                continue
        raise


def with_ranks(launch: Launch, world: int) -> Launch:
    """Return the launch with fewer ranks; the others are its surplus.

    ``local_world`` must be the same on all ranks, even if the last host keeps fewer than the others: groups of that
    many consecutive ranks are within a host.
    """
    local_world = world if world < launch.local_world else math.gcd(world, launch.local_world)
    return replace(launch, world=world, local_world=local_world, surplus=launch.world + launch.surplus - world)


def is_elastic(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether torchrun started this process with a range of nodes, ``--nnodes MIN:MAX``.

    Args:
        environ: the environment; that of this process if None.
    """
    env = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return False
    nodes = _nnodes_of_agent() or env.get("PET_NNODES", "")  # the option, or torchrun's variable for it
    found = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", nodes)
    return found is not None and int(found[1]) < int(found[2])


def _nnodes_of_agent() -> str:
    """Return the value of the option ``--nnodes`` of the nearest parent process with one; ranks aren't told it."""
    process = os.getppid()
    try:
        while process > 0:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if found := nnodes_option(words):
                return found
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # no /proc
        pass
    return ""


def nnodes_option(words: list[str]) -> str:
    """Return the value of the option ``--nnodes`` of a command line; empty if it has none."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, given, value = word.partition("=")
        if name == "--nnodes":
            return value if given else following
    return ""
