"""Weights & Biases, which DeepSpeed's ``wandb`` section starts: check the login before a run, and end its run."""

from __future__ import annotations

import sys

from diffmoe_ds.errors import ConfigError

WANDB_ONLINE = ("online", "shared", "run")
"""Modes that need a login."""


def check_wandb_login() -> None:
    """Check that Weights & Biases can start; it would fail after the run directory has been written.

    Raises:
        ConfigError: it would be online, and nobody is logged in.
    """
    import wandb

    if wandb.run is not None:  # a notebook's
        return
    try:
        missing = wandb.setup().settings.mode in WANDB_ONLINE and not wandb.login(prompt=False, verify=False)
    finally:
        wandb.teardown()  # the run sets WANDB_DIR, which is read only once
    if missing:
        error = ConfigError(
            "wandb.enabled: nobody is logged in to Weights & Biases; run `wandb login`, set WANDB_MODE=offline, or "
            "disable it."
        )
        error.same_on_all_ranks = False  # only rank 0 checks
        raise error


def finish_wandb() -> None:
    """Upload or write what is left: the process may exit without Python's own cleanup."""
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    try:
        wandb.finish()
    except Exception as error:  # of any kind; the run itself is saved
        print(f"*** WARNING: Weights & Biases: {' '.join(str(error).split())} ***", file=sys.stderr, flush=True)
