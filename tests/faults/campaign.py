"""A fault-injection campaign: an undisturbed reference run, a disturbed run, and the checks that compare them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.processes import (
    BATCH,
    STEPS,
    Failed,
    Ranks,
    done,
    metrics,
    saved,
)
from tests.helpers.processes import REPOSITORY, free_port, rank_environment
from tests.helpers.training import training_arguments, write_json

SAVE_STEPS = 10
RANK_TIMEOUT_S = 15
FIRST_STEP = " ETA "
"""Printed at every step."""
START_LIMIT_S = 600
"""From the start to the first step; beside other work this has taken over two minutes."""
LEAVE_LIMIT_S = RANK_TIMEOUT_S + 25
"""From a fault until every process has exited."""


@dataclass
class Row:
    """One line of the table."""

    fault: str
    runs: int = 0
    longest_s: float = 0.0
    steps_lost: int = 0
    codes: set[int] = field(default_factory=set)


class Campaign:
    """The reference run and the disturbed one."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.rows: dict[str, Row] = {}
        self.expected: dict[int, dict] = {}
        self.directory = folder / "run"
        self.config = write_json(folder / "ds.json", ep=2, zero=2, train_batch_size=BATCH)

    def start(self, directory: Path, *overrides: str) -> Ranks:
        log = self.folder / "log"
        settings = (
            f"run.total_images={STEPS * BATCH}", f"run.save_every_images={SAVE_STEPS * BATCH}",
            f"run.log_every_images={BATCH}", f"run.rank_timeout_s={RANK_TIMEOUT_S}", *overrides,
        )  # fmt: skip
        arguments = training_arguments(self.config, directory, *settings)
        port = free_port()
        with log.open("w") as output:
            processes = [
                subprocess.Popen(
                    [sys.executable, "diffmoe_ds/train.py", *arguments], cwd=REPOSITORY, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                    env=rank_environment(rank, 2, port, PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1"),
                )
                for rank in range(2)
            ]  # fmt: skip
        return Ranks(processes, log)

    def reference(self) -> None:
        """Run without faults."""
        ranks = self.start(self.folder / "reference")
        try:
            codes = ranks.wait(START_LIMIT_S + 300)
        finally:
            ranks.end()
        if codes != [0, 0]:
            raise Failed(ranks.text())
        self.expected = {row["step"]: row for row in metrics(self.folder / "reference")}
        assert len(self.expected) == STEPS

    def trial(self, fault: str, inject: Callable[[Ranks], float | None], codes: set[int], *overrides: str) -> str:
        """Start the disturbed run, inject a fault and check the result; counts unless the fault came too late.

        Args:
            fault: its name in the table.
            inject: injects the fault and returns the time, or None if it was too late.
            codes: valid exit codes of ranks that were not killed, besides 0.
            overrides: settings of this trial.

        Returns:
            The output of the ranks.
        """
        if done(self.directory):
            self.check_curve(complete=True)
            shutil.rmtree(self.directory)
        row = self.rows.setdefault(fault, Row(fault))
        saved_before = saved(self.directory)
        ranks = self.start(self.directory, *overrides)
        try:
            self.wait_for(ranks, FIRST_STEP)
            if saved_before is not None and f"at {saved_before:,} images" not in ranks.text():
                raise Failed(f"did not continue at {saved_before} images:\n{ranks.text()[-3000:]}")
            began = inject(ranks)
            found = ranks.wait(LEAVE_LIMIT_S)
            left = time.monotonic()
        finally:
            ranks.end()
        text = ranks.text()
        if set(found) - codes - {0} or "Traceback" in text:
            raise Failed(f"{fault}: exit codes {found}:\n{text[-3000:]}")
        self.check_curve(complete=False)
        seen = max((row["step"] for row in metrics(self.directory)), default=0)
        completed = saved(self.directory) or 0
        announced = [int(line.split("images_")[1].split()[0]) for line in text.splitlines() if "saved  " in line]
        if announced and completed < max(announced):
            raise Failed(f"{fault}: {max(announced)} images were saved, but {completed} are in the newest checkpoint")
        if began is not None and (any(found) or ranks.killed):  # else the run was complete before the fault
            row.runs += 1
            row.longest_s = max(row.longest_s, left - began)
            row.codes |= set(found)
            row.steps_lost = max(row.steps_lost, seen - completed // BATCH)
        return text

    def until_counted(self, trial: Callable[[], None]) -> None:
        """Repeat a trial until the fault comes in time."""
        before = sum(row.runs for row in self.rows.values())
        for _ in range(10):
            trial()
            if sum(row.runs for row in self.rows.values()) > before:
                return
        raise Failed("ten attempts came too late")

    def check_curve(self, complete: bool) -> None:
        """Check that every row equals that of the reference, in order and without gaps."""
        rows = metrics(self.directory)
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            raise Failed(f"steps {[row['step'] for row in rows]}")
        for row in rows:
            for key in ("loss", "grad_norm", "images", "capacity_loss"):
                if row[key] != self.expected[row["step"]][key]:
                    raise Failed(f"step {row['step']}: {key} {row[key]} != {self.expected[row['step']][key]}")
        if complete and len(rows) != STEPS:
            raise Failed(f"{len(rows)} of {STEPS} steps")

    def wait_for(self, ranks: Ranks, sign: str) -> None:
        """Wait until the ranks have printed a text or one of them has exited."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if sign in ranks.text() or any(process.poll() is not None for process in ranks.processes):
                return
            time.sleep(0.01)
        raise Failed(f"no {sign!r} after {START_LIMIT_S} s:\n{ranks.stacks()}")
