"""Is a checkpoint whole, and which is the newest that is?"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from diffmoe_ds.checkpoint.layout import LATEST, MANIFEST, META, checkpoint_images, checkpoint_root
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Digest, sha256_of


def listed_sha256(files: dict) -> str:
    """Checksum of a manifest's own list, so that damage to it is not taken for damage to the files it names."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Digest]:
    """What a checkpoint's manifest says of each of its files.

    Raises:
        CheckpointError: the manifest is missing or not one.
    """
    manifest = path / MANIFEST
    try:
        tree = json.loads(manifest.read_text(encoding="utf-8"))
        if listed_sha256(tree["files"]) != tree["sha256"]:
            raise ValueError("changed")
        files = {name: Digest(int(entry["bytes"]), str(entry["sha256"])) for name, entry in tree["files"].items()}
    except OSError as error:
        raise CheckpointError(f"{manifest}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{manifest}: is damaged: it is no manifest.") from None
    if META not in files or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{manifest}: is damaged: it names {', '.join(map(repr, sorted(files))) or 'no file'}.")
    return files


def check_sizes(path: Path) -> dict[str, Digest]:
    """Quick check: every file is there with its size, and ``meta.json`` with its checksum.

    Returns:
        The manifest.

    Raises:
        CheckpointError: the first file that is missing, cut or changed.
    """
    files = read_manifest(path)
    for name, digest in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}.") from None
        if size != digest.size:
            raise CheckpointError(
                f"{path / name}: is damaged: it has {size} bytes, but was written with {digest.size}."
            )
    check_contents(path, {META: files[META]})
    return files


def check_contents(path: Path, files: dict[str, Digest]) -> None:
    """Full check of some files of a checkpoint.

    Raises:
        CheckpointError: the first file whose bytes are not those that were written.
    """
    for name, digest in files.items():
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}.") from None
        if found != digest.sha256:
            raise CheckpointError(f"{path / name}: is damaged: its bytes are not those that were written.")


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path means, the first choice first; none if there is none.

    A checkpoint means itself.  A run directory, or its ``checkpoints``, means the one that ``latest`` names, then all
    others from the newest to the oldest.
    """
    try:
        if (path / META).is_file() or (path / MANIFEST).is_file():
            return [path]
        for root in (checkpoint_root(path), path):
            if root.is_dir():
                found = [p for p in root.iterdir() if checkpoint_images(p.name) is not None and p.is_dir()]
                if found:
                    return sorted(found, key=lambda p: (p.name == _latest(root), p.name), reverse=True)
    except OSError as error:  # a name that no file system takes, a folder that may not be read
        raise CheckpointError(f"{str(path)[:200]}: cannot be read: {error.strerror}.") from None
    return []


def newest_valid(path: Path, *, full: bool) -> Path | None:
    """The first of `candidates` that passes its check; each one that does not is warned of.

    Args:
        path: a checkpoint, a run directory or its ``checkpoints``.
        full: read every byte, not the sizes only.

    Returns:
        The checkpoint; none if there are no candidates.

    Raises:
        CheckpointError: there are candidates and none is valid.
    """
    every = candidates(path)
    for candidate in every:
        try:
            files = check_sizes(candidate)
            if full:
                check_contents(candidate, files)
            return candidate
        except CheckpointError as error:
            if len(every) == 1:
                raise
            warn_skipped(candidate, error)
    if every:
        raise no_valid_one(path, len(every))
    return None


def warn_skipped(path: Path, error: CheckpointError) -> None:
    """Say loudly that a checkpoint is not used."""
    print(f"\n*** WARNING: the checkpoint {path} is skipped. {error} ***\n", file=sys.stderr, flush=True)


def no_valid_one(path: Path, count: int) -> CheckpointError:
    """The error of a directory whose checkpoints are all damaged: starting anew there would hide it."""
    return CheckpointError(
        f"{path}: none of its {count} checkpoint(s) is valid (see the warnings); mend them, or give another --run-dir."
    )


def _latest(root: Path) -> str:
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def shares(files: dict[str, Digest], rank: int, world: int) -> dict[str, Digest]:
    """The files that one of several ranks checks, so that together they check all."""
    return {name: digest for index, (name, digest) in enumerate(sorted(files.items())) if index % world == rank}
