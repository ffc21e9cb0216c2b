"""The processes of a run under fault injection, the files that it writes, and a small disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

STEPS = 400
BATCH = 16
PRINT_S = 3
"""Seconds for a process to print its stacks."""


class Failed(AssertionError):
    """A guarantee was violated."""


@dataclass
class Ranks:
    """The processes of one start."""

    processes: list[subprocess.Popen]
    log: Path
    killed: set[int] = field(default_factory=set)
    """Process ids of those that the campaign killed while they ran."""

    def kill(self, process: subprocess.Popen) -> None:
        """Send SIGKILL to a rank and wait for it; one that had already exited keeps its exit code."""
        process.kill()
        if process.wait() == -signal.SIGKILL:
            self.killed.add(process.pid)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, limit_s: float) -> list[int]:
        """Return the exit codes of the ranks that the campaign did not kill; negative for a signal.

        Raises:
            Failed: a rank is still running after ``limit_s`` seconds.
        """
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise Failed(f"a rank is still running after {limit_s} s:\n{self.stacks()}") from None
        return [process.returncode for process in self.processes if process.pid not in self.killed]

    def stacks(self) -> str:
        """End the ranks and their workers by SIGABRT and return the output.

        With PYTHONFAULTHANDLER, each prints where its threads are.
        """
        for process in self.processes:
            if process.poll() is None:
                workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (*map(int, workers), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGABRT)
        time.sleep(PRINT_S)
        self.end()
        return self.text()

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def metrics(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be half written, or be cut off by a kill
            rows.append(json.loads(line))
    return rows


def done(directory: Path) -> bool:
    return (saved(directory) or 0) >= STEPS * BATCH


def saved(directory: Path) -> int | None:
    """Images of the checkpoint that ``latest`` names."""
    pointer = directory / "checkpoints" / "latest"
    return int(pointer.read_text().split("_")[1]) if pointer.exists() else None


def checkpoints(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("images_*"), reverse=True)


def writing(directory: Path) -> bool:
    try:
        return any((directory / "checkpoints").glob(".writing-*/images_*"))
    except OSError:
        return False


def mount_small_disk(folder: Path, megabytes: int) -> bool:
    """Mount a tmpfs; return False if not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=20)
