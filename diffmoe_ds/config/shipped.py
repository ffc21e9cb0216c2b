"""Files for users that come with the package: DeepSpeed JSON files, launchers and Slurm scripts.

In a checkout, ``diffmoe_ds/shipped`` has links to the folders at the top; a wheel has the files themselves.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent / "shipped"
FOLDERS = ("ds_configs", "launchers", "slurm")
"""Folders in `SHIPPED`."""


def deepspeed_json_path(name: str | Path) -> Path:
    """Return the file that ``--deepspeed_config`` names.

    Args:
        name: path of a file, or else the name of a shipped one, such as ``zero2``.
    """
    known = shipped_jsons()
    return Path(name) if Path(name).is_file() else known.get(str(name), Path(name))


def shipped_jsons() -> dict[str, Path]:
    """Return the paths of the shipped DeepSpeed JSON files by name."""
    return {path.stem: path for path in sorted((SHIPPED / "ds_configs").glob("*.json"))}
