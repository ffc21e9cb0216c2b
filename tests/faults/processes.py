"""The ranks of a run under fault injection, what they leave in the run directory, and a small disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.processes import ForkedProcess

WORLD = 2
BATCH = 16
STEPS = 12
SAVE_STEPS = 2
RANK_TIMEOUT_S = 6
START_TIMEOUT_S = 10
"""Seconds that ranks wait for one that has died before it joined."""
LEAVE_LIMIT_S = RANK_TIMEOUT_S + START_TIMEOUT_S + 44
"""From a fault until every rank has exited; more is a hang.  The machine may be busy."""
START_LIMIT_S = 300
"""From the start of the ranks to their exit if the fault does not occur."""
PRINT_S = 2
"""Seconds for a process to print its stacks."""


class Failed(AssertionError):
    """A guarantee was violated."""

    def __init__(self, result: str, message: str) -> None:
        """Describe the violation.

        Args:
            result: ``hang``, ``blame``, ``lost`` or ``other``; a column of the table.
            message: what happened, with the end of the output.
        """
        super().__init__(message)
        self.result = result


class TooLate(Exception):
    """The ranks had exited before the fault occurred."""


@dataclass
class Ranks:
    """The processes of one start."""

    processes: list[ForkedProcess]
    log: Path
    fired: Path
    """File with a line for every fault that the shim has injected."""
    killed: set[int] = field(default_factory=set)
    """Ranks that the campaign has killed while they ran."""

    def is_running(self, rank: int) -> bool:
        return self.processes[rank].poll() is None

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank.

        Raises:
            TooLate: it has exited.
        """
        if not self.is_running(rank):
            raise TooLate
        os.kill(self.processes[rank].pid, number)

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank and wait for it; one that has already exited keeps its exit code."""
        with contextlib.suppress(TooLate, ProcessLookupError):
            self.send(rank, signal.SIGKILL)
        while self.is_running(rank):
            time.sleep(0.002)
        if self.processes[rank].poll() == -signal.SIGKILL:
            self.killed.add(rank)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, began: float | None = None, without: Collection[int] = ()) -> float:
        """Wait until the ranks have exited; return the seconds since the fault, or -1 if none occurred.

        Args:
            began: time of the fault; None for a fault of the shim.
            without: ranks that are not awaited.

        Raises:
            Failed: a rank is still running after the limit.
        """
        started = time.monotonic()
        while any(self.is_running(rank) for rank in range(len(self.processes)) if rank not in without):
            now = time.monotonic()
            if began is None and self.fired.exists():
                began = now
            if now > started + START_LIMIT_S or (began is not None and now > began + LEAVE_LIMIT_S):
                raise Failed("hang", f"still running after {LEAVE_LIMIT_S} s:\n{self.stacks()[-6000:]}")
            time.sleep(0.01)
        if began is None:
            return 0.0 if self.fired.exists() else -1.0
        return time.monotonic() - began

    def killed_by_the_shim(self) -> set[int]:
        """Return the ranks in which the shim has sent SIGKILL."""
        lines = self.fired.read_text().splitlines() if self.fired.exists() else []
        pids = {int(line.split()[0]) for line in lines if line.split()[2].endswith("kill")}
        return {rank for rank, process in enumerate(self.processes) if process.pid in pids}

    def codes(self) -> list[int]:
        """Return the exit codes of the ranks that were not killed."""
        ended = {rank: process.poll() for rank, process in enumerate(self.processes)}
        return [code for rank, code in ended.items() if rank not in self.killed and code is not None]

    def stacks(self) -> str:
        """End the ranks by SIGABRT and return the output: Python's fault handler prints where their threads are."""
        for rank in range(len(self.processes)):
            with contextlib.suppress(TooLate, ProcessLookupError):
                self.send(rank, signal.SIGABRT)
        time.sleep(PRINT_S)
        self.end()
        return self.text()

    def end(self) -> None:
        """Kill what is left of the ranks and their loader workers, each rank's in a process group of its own."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        while any(self.is_running(rank) for rank in range(len(self.processes))):
            time.sleep(0.002)


def loader_workers(pid: int) -> list[int]:
    """Return the process ids of the loader workers of a rank."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                if Path(f"/proc/{child}/comm").read_text().strip() == "pt_data_worker":
                    found.append(child)
    return sorted(found)


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def metrics(directory: Path) -> list[dict]:
    """Return the complete rows of ``metrics.jsonl``.

    Raises:
        Failed: one of them is not JSON.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    # the last row may be half written, or be cut off by a kill
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise Failed("other", f"{path}: {error}") from None


def checkpoints(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("images_[0-9]*"), reverse=True)


def snapshot(run: Path) -> dict[str, tuple[int, str]]:
    """Return inode and contents of every file, and the inode of every directory."""
    found = {}
    for path in sorted(run.rglob("*")):
        contents = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(run))] = (path.lstat().st_ino, contents)
    return found


def mount_small_disk(folder: Path, megabytes: int) -> bool:
    """Mount a tmpfs; return False if not permitted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=20)
