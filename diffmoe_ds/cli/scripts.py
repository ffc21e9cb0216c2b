"""``diffmoe scripts``: copy the launchers, Slurm scripts and DeepSpeed JSON files that come with the package."""

from __future__ import annotations

import argparse
import shlex
import shutil
import uuid
from pathlib import Path

from diffmoe_ds.cli.arguments import nonempty_path
from diffmoe_ds.config.shipped import FOLDERS, SHIPPED
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import TMP_PREFIX, remove_tree, write_error

EXAMPLES = """examples:
  diffmoe scripts --out cluster
  cluster/launchers/local.sh --dry-run
  sbatch cluster/slurm/train.sbatch --config imagenet-256 --deepspeed_config zero2
"""


def add_scripts_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe scripts``."""
    text = f"where to put the folders {', '.join(FOLDERS)}; created if it does not exist"
    parser.add_argument("--out", type=nonempty_path, required=True, metavar="DIR", help=text)


def scripts_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe scripts``.

    Raises:
        ConfigError: one of the folders exists already.
        CheckpointError: they cannot be written.
    """
    out: Path = args.out
    for name in FOLDERS:
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists already; remove it, or pass another --out.")
    copy_scripts(out)
    quoted = shlex.quote(str(out))
    print(
        f"{'scripts':>11}  {', '.join(str(out / name) for name in FOLDERS)}\n"
        f"{'next':>11}  {quoted}/launchers/local.sh --dry-run; on a Slurm cluster, copy "
        f"{quoted}/slurm/env.example to {quoted}/slurm/env.sh, edit it, and run: "
        f"bash {quoted}/slurm/train.sbatch --dry-run"
    )


def copy_scripts(out: Path) -> None:
    """Copy the folders, with the permissions of their files.

    Args:
        out: their new parent.

    Raises:
        CheckpointError: they cannot be written; none of them is left behind.
    """
    tmp, moved = out / f"{TMP_PREFIX}{uuid.uuid4().hex[:12]}", []
    try:
        for name in FOLDERS:
            shutil.copytree(SHIPPED / name, tmp / name)
        for name in FOLDERS:
            moved.append((tmp / name).rename(out / name))
    except OSError as error:
        for folder in moved:
            remove_tree(folder, ignore_errors=True)
        raise write_error(out, error) from None
    finally:
        remove_tree(tmp, ignore_errors=True)
