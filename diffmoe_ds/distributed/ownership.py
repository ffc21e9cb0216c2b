"""Ownership of a run directory: a job that has lost it can no longer change it.

A process can be suspended between any check and the system call that follows, and continue hours later, when another
job owns the run directory.  So no check protects a rename.  Instead, every rename of an owner has its source or its
target in a directory of its own, ``.writing-TOKEN``: new files are written there and moved out, and what is to be
removed is moved in first.  A new owner begins by moving the directories of all others away.  After that, the next
rename of a suspended owner fails, because one of its two paths no longer exists.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ds.files import REMOVING_PREFIX, TMP_PREFIX, Progress, free_name, remove_tree

MOVING = "moving"
"""Subdirectory for what is on its way from one published name to another."""
OWNERS = re.compile(f"({re.escape(REMOVING_PREFIX)})?{re.escape(TMP_PREFIX)}[0-9a-f]{{16}}")
"""Names of the directories of owners, also of those that could not be removed."""
LEFTOVERS = re.compile(f"({re.escape(TMP_PREFIX)}|{re.escape(REMOVING_PREFIX)}).*")
"""Names of everything that killed processes may have left behind."""


@dataclass(frozen=True)
class Owner:
    """An owner of directories.  Rank 0 claims and releases them; all ranks write into `directory`."""

    token: str
    """16 hexadecimal digits, different for each owner."""

    def directory(self, root: Path) -> Path:
        """Return this owner's own directory in one that it owns."""
        return root / f"{TMP_PREFIX}{self.token}"

    def claim(self, root: Path) -> None:
        """Create this owner's directory; once only, because a suspended owner must not create it again.

        Raises:
            OSError: it cannot be created.
        """
        (self.directory(root) / MOVING).mkdir(parents=True)

    def fence_others(self, root: Path, leftovers: re.Pattern[str], progress: Progress = lambda: None) -> None:
        """Move away and remove what others have left in a directory; from then on, they cannot rename anything in it.

        What cannot be removed stays under another name, with a warning; the next owner tries again.

        Args:
            root: the directory.
            leftovers: names of what may be removed, `OWNERS` or `LEFTOVERS`.
            progress: called after each removed file.

        Raises:
            OSError: the directory cannot be read.
        """
        for path in sorted(root.iterdir()):
            if path == self.directory(root) or not leftovers.fullmatch(path.name):
                continue
            name = f"{REMOVING_PREFIX}{path.name.removeprefix(REMOVING_PREFIX)}"
            garbage = free_name(self._own(root, name))
            try:
                path.rename(garbage)
                _restore(garbage, root)
                _remove(garbage, progress)
            except OSError as error:
                if not os.path.lexists(path) and not os.path.lexists(garbage):
                    continue  # its owner has removed it meanwhile
                print(f"*** WARNING: {path}: cannot be removed: {error.strerror} ***", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):  # otherwise it would be a level deeper after every start
                    garbage.rename(free_name(root / name))

    def move(self, source: Path, target: Path) -> None:
        """Rename something in a directory that this owner owns.

        Raises:
            OSError: it cannot be renamed, for example because another owner has taken over.
        """
        passing = self._own(source.parent, MOVING) / target.name
        source.rename(passing)
        passing.rename(target)

    def remove(self, path: Path, progress: Progress = lambda: None) -> None:
        """Remove something from a directory that this owner owns; it disappears at once, its contents gradually.

        Args:
            path: what to remove.
            progress: called after each removed file.

        Raises:
            OSError: it cannot be moved, for example because another owner has taken over, or not be removed completely.
        """
        garbage = free_name(self._own(path.parent, f"{REMOVING_PREFIX}{path.name}"))
        path.rename(garbage)
        _remove(garbage, progress)

    def release(self, root: Path) -> None:
        """Remove this owner's directory, and with it whatever is not published."""
        remove_tree(self.directory(root), ignore_errors=True)

    def _own(self, root: Path, name: str) -> Path:
        return self.directory(root) / name


def _remove(garbage: Path, progress: Progress) -> None:
    """Remove something that was moved into an owner's directory, reporting progress on directories of many files."""
    if garbage.is_dir() and not garbage.is_symlink():
        for path in garbage.iterdir():
            remove_tree(path)
            progress()
    remove_tree(garbage)
    progress()


def _restore(garbage: Path, root: Path) -> None:
    """Give what an owner was moving when it was killed its new name, also if its directory was being removed itself."""
    if not garbage.is_dir() or garbage.is_symlink():
        return
    moving = garbage / MOVING
    for path in moving.iterdir() if moving.is_dir() else ():
        path.rename(free_name(root / path.name))
    for path in garbage.iterdir():
        if path.name.startswith(REMOVING_PREFIX) and OWNERS.fullmatch(path.name.removeprefix(REMOVING_PREFIX)):
            _restore(path, root)
