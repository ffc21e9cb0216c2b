"""Injection of system-call faults into a process: compiles `shim.c` and describes its rules."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


@dataclass(frozen=True)
class Rule:
    """One fault: what happens at the n-th matching call."""

    operation: str
    """``open``, ``read``, ``write``, ``fsync``, ``truncate``, ``rename``, ``link``, ``unlink`` or ``mkdir``."""
    pattern: str
    """Pattern of `fnmatch` for the path, in which ``*`` also matches slashes; no whitespace."""
    action: str
    """Name of an errno, ``sleep:SECONDS``, ``stop``, ``kill``, ``after-stop`` or ``after-kill``."""
    n: int = 1
    """Number of the matching call, from 1."""
    repeats: bool = False
    """Whether the fault also happens at every later one."""

    def line(self) -> str:
        """Return the rule as the shim reads it."""
        assert not any(character.isspace() for character in self.pattern), self.pattern
        action = str(getattr(errno, self.action)) if hasattr(errno, self.action) else self.action
        return f"{self.operation} {self.pattern} {self.n}{'+' if self.repeats else ''} {action}"


@functools.cache
def library() -> Path:
    """Compile the shim, once for each version of its source; return the shared library."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    out = Path(tempfile.gettempdir()) / f"diffmoe-shim-{os.getuid()}-{digest}.so"
    if not out.exists():
        with tempfile.NamedTemporaryFile(dir=out.parent, suffix=".so", delete=False) as tmp:
            command = ["cc", "-shared", "-fPIC", "-O1", "-o", tmp.name, str(SOURCE), "-ldl"]
            subprocess.run(command, check=True, timeout=120)
        Path(tmp.name).rename(out)
    return out


def fault_environment(*rules: Rule, log: Path | None = None, clock_shift_s: int = 0) -> dict[str, str]:
    """Return the variables that inject faults into a process and its children.

    Args:
        rules: the faults.
        log: file to which every fault that happens appends a line: process id, operation, action and path.
        clock_shift_s: seconds that the process's wall clock is ahead.
    """
    variables = {"LD_PRELOAD": str(library()), "FAULTS": "\n".join(rule.line() for rule in rules)}
    if log is not None:
        variables["FAULTS_LOG"] = str(log)
    return {**variables, "CLOCK_SHIFT": str(clock_shift_s)}
