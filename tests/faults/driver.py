"""Break runs in every way that clusters do, start them again, and see whether anything was lost.

    python -m tests.faults.driver --seed 0 --kill 25 --kill-in-save 15 --others 10 --out table.md

One run of two ranks (EP 2, ZeRO 2) goes undisturbed and is the reference.  A second run of the same configuration is
disturbed again and again: each trial starts it, injects one fault at a random time, waits until every process has
left, and checks what it left behind.  When it has reached its end, a new one begins.  After every start the rows of
``metrics.jsonl`` must be those of the reference, digit for digit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.processes import (
    BATCH,
    STEPS,
    Failed,
    Ranks,
    checkpoints,
    done,
    metrics,
    mount_small_disk,
    saved,
    unmount,
    writing,
)
from tests.helpers.processes import REPOSITORY, free_port, rank_environment
from tests.helpers.training import training_arguments, write_json

SAVE_STEPS = 10
RANK_TIMEOUT_S = 8
FIRST_STEP = " ETA "
"""What every step prints."""
START_LIMIT_S = 120
"""From the start to the first step; the machine may be busy."""
LEAVE_LIMIT_S = RANK_TIMEOUT_S + 25
"""From a fault until every process has left."""


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
                    env=rank_environment(rank, 2, port, PYTHONUNBUFFERED="1"),
                )
                for rank in range(2)
            ]  # fmt: skip
        return Ranks(processes, log)

    def reference(self) -> None:
        """The undisturbed run."""
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
        """Start the disturbed run, inject, and check; counted unless the fault came too late.

        Args:
            fault: its name in the table.
            inject: does it and returns when it did, None if it was too late.
            codes: what a rank that could choose may leave with, besides 0.
            overrides: settings of this trial.

        Returns:
            What the ranks printed.
        """
        if done(self.directory):
            self.check_curve(complete=True)
            shutil.rmtree(self.directory)
        row = self.rows.setdefault(fault, Row(fault))
        saved_before = saved(self.directory)
        ranks = self.start(self.directory, *overrides)
        try:
            self._wait_for(ranks, FIRST_STEP)
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
            raise Failed(f"{fault}: {max(announced)} images were saved, {completed} are there")
        if began is not None and (any(found) or ranks.killed):  # else the run was complete before the fault reached it
            row.runs += 1
            row.longest_s = max(row.longest_s, left - began)
            row.codes |= set(found)
            row.steps_lost = max(row.steps_lost, seen - completed // BATCH)
        return text

    def until_counted(self, trial: Callable[[], None]) -> None:
        """A try that comes too late is no trial."""
        before = sum(row.runs for row in self.rows.values())
        for _ in range(10):
            trial()
            if sum(row.runs for row in self.rows.values()) > before:
                return
        raise Failed("ten tries came too late")

    def check_curve(self, complete: bool) -> None:
        """Every row equals the reference's, in order and without a gap."""
        rows = metrics(self.directory)
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            raise Failed(f"steps {[row['step'] for row in rows]}")
        for row in rows:
            for key in ("loss", "grad_norm", "images", "capacity_loss"):
                if row[key] != self.expected[row["step"]][key]:
                    raise Failed(f"step {row['step']}: {key} {row[key]} != {self.expected[row['step']][key]}")
        if complete and len(rows) != STEPS:
            raise Failed(f"{len(rows)} of {STEPS} steps")

    def _wait_for(self, ranks: Ranks, sign: str) -> None:
        """Until the ranks have printed a sign, or the first of them has left."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if sign in ranks.text() or any(process.poll() is not None for process in ranks.processes):
                return
            time.sleep(0.01)
        raise Failed(f"no {sign!r} after {START_LIMIT_S} s:\n{ranks.text()[-3000:]}")

    # The faults.

    def kill(self) -> None:
        """SIGKILL of a random rank at a random time."""

        def inject(ranks: Ranks) -> float | None:
            time.sleep(self.random.uniform(0, 3))
            victim = self.random.choice(ranks.processes)
            late = victim.poll() is not None
            ranks.kill(victim)
            return None if late else time.monotonic()

        text = self.trial("SIGKILL of a rank", inject, {85})
        if "complete" not in text and f"{STEPS * BATCH:,} of" not in text and " died in step " not in text:
            raise Failed(f"nobody says who died:\n{text[-3000:]}")

    def kill_in_save(self) -> None:
        """SIGKILL of a random rank while a checkpoint is written."""

        def inject(ranks: Ranks) -> float | None:
            time.sleep(self.random.uniform(0, 2))
            victim, deadline = self.random.choice(ranks.processes), time.monotonic() + 20
            wait_s, inside = self.random.uniform(0, 0.004), False
            while time.monotonic() < deadline and victim.poll() is None and not inside:
                if writing(self.directory):
                    time.sleep(wait_s)
                    ranks.kill(victim)
                    inside = writing(self.directory)
            ranks.kill(victim)
            return time.monotonic() if inside else None

        self.trial("SIGKILL inside a save", inject, {85})

    def stop(self) -> None:
        """SIGSTOP of a random rank: the other leaves within the limit."""

        def inject(ranks: Ranks) -> float | None:
            time.sleep(self.random.uniform(0, 2))
            frozen, began = self.random.choice(ranks.processes), time.monotonic()
            late = frozen.poll() is not None
            frozen.send_signal(signal.SIGSTOP)
            other = next(p for p in ranks.processes if p is not frozen)
            try:
                other.wait(LEAVE_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"hangs beside a frozen rank:\n{ranks.text()[-3000:]}") from None
            if other.returncode and "has not answered for" not in ranks.text():
                raise Failed(f"nobody says who is frozen:\n{ranks.text()[-3000:]}")
            ranks.kill(frozen)
            return None if late else began

        self.trial("SIGSTOP of a rank", inject, {85})

    def usr1(self) -> None:
        """SIGUSR1 to a random rank: saved, 85, and nothing lost."""

        def inject(ranks: Ranks) -> float:
            time.sleep(self.random.uniform(0, 2))
            self.random.choice(ranks.processes).send_signal(signal.SIGUSR1)
            return time.monotonic()

        self.trial("SIGUSR1 to a rank", inject, {85})
        rows = metrics(self.directory)
        if saved(self.directory) != rows[-1]["images"]:
            raise Failed("a step was lost after SIGUSR1")

    def damage(self, kind: str) -> None:
        """Damage the newest checkpoint; the next start names the file and takes the one before."""
        self.usr1()
        while len(checkpoints(self.directory)) < 2:
            self.usr1()
        newest, second = checkpoints(self.directory)[:2]
        file = self.random.choice(sorted(newest.iterdir()))
        if kind == "flipped byte":
            data = bytearray(file.read_bytes())
            position = self.random.randrange(len(data))
            data[position] ^= 1 << self.random.randrange(8)
            file.write_bytes(data)
        elif kind == "truncated file":
            os.truncate(file, self.random.randrange(file.stat().st_size))
        else:
            file.unlink()
        expected = int(second.name.split("_")[1])
        ranks = self.start(self.directory)
        row = self.rows.setdefault(kind, Row(kind))
        try:
            self._wait_for(ranks, "saved  ")  # so that `latest` is a whole one again
            text = ranks.text()
            self.random.choice(ranks.processes).send_signal(signal.SIGUSR1)
            began = time.monotonic()
            codes = ranks.wait(LEAVE_LIMIT_S)
            row.longest_s = max(row.longest_s, time.monotonic() - began)
        finally:
            ranks.end()
        harmless = kind == "flipped byte" and file.name == "manifest.json" and "WARNING" not in text
        if not harmless and (str(file) not in text or "WARNING" not in text or f"at {expected:,} images" not in text):
            raise Failed(f"{kind} of {file}: not named, or not continued at {expected:,}:\n{text[-3000:]}")
        if set(codes) - {0, 85}:
            raise Failed(f"{kind}: exit codes {codes}:\n{ranks.text()[-3000:]}")
        self.check_curve(complete=False)
        row.runs += 1
        row.codes |= set(codes)
        row.steps_lost = max(row.steps_lost, (int(newest.name.split("_")[1]) - expected) // BATCH)

    def full_disk(self, disk: Path, on_error: str) -> None:
        """The disk fills at a random time; the run stops with 5, or goes on until there is room again."""
        directory, filler, name = disk / "run", disk / "filler", f"full disk, on_error={on_error}"
        disturbed, self.directory = self.directory, directory

        def inject(ranks: Ranks) -> float:
            if not checkpoints(directory):
                self._wait_for(ranks, "saved  ")  # there has to be one that the fault could cost
            time.sleep(self.random.uniform(0.2, 1.5))
            began = time.monotonic()
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 65536)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not any(p.poll() is not None for p in ranks.processes):
                if "No space left" in ranks.text() and "was not saved" in ranks.text():
                    break
                time.sleep(0.05)
            if on_error == "continue":
                filler.unlink()
                time.sleep(0.5)
                ranks.processes[0].send_signal(signal.SIGUSR1)
                began = time.monotonic()
            return began

        try:
            settings = (f"checkpoint.on_error={on_error}", "checkpoint.keep_last=2")
            text = self.trial(name, inject, {5} if on_error == "stop" else {85}, *settings)
            if "No space left" not in text or not checkpoints(directory):
                raise Failed(f"{name}: not said, or nothing kept:\n{text[-3000:]}")
            filler.unlink(missing_ok=True)
        finally:
            self.directory = disturbed


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| fault | runs | longest time until all had left | exit codes of those that could | most steps done again |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        codes = ", ".join(map(str, sorted(row.codes))) or "-"
        lines.append(f"| {row.fault} | {row.runs} | {row.longest_s:.1f} s | {codes} | {row.steps_lost} |")
    return "\n".join(lines) + "\n"


def run(
    folder: Path, seed: int, kill: int, kill_in_save: int, others: int, report: Callable[[str, dict[str, Row]], None]
) -> dict[str, Row]:
    """A whole campaign, the faults in random order; ``report`` hears of every trial, and what there is so far.

    Raises:
        Failed: at the first broken promise, with what the ranks printed.
    """
    campaign = Campaign(folder, seed)
    campaign.reference()
    trials = [campaign.kill] * kill + [campaign.kill_in_save] * kill_in_save
    trials += [campaign.stop, campaign.usr1] * others
    for kind in ("truncated file", "flipped byte", "removed file"):
        trials += [lambda kind=kind: campaign.damage(kind)] * others
    disk = folder / "disk"
    has_disk = mount_small_disk(disk, 8)
    try:
        if has_disk:
            for number in range(max(others, 2)):  # with each on_error at least once
                trials.append(lambda n=number: campaign.full_disk(disk, ("stop", "continue")[n % 2]))
        campaign.random.shuffle(trials)
        for number, trial in enumerate(trials):
            campaign.until_counted(trial)
            report(f"{number + 1} of {len(trials)} trials", campaign.rows)
    finally:
        if has_disk:
            unmount(disk)
    if not has_disk:
        campaign.rows["full disk"] = Row("full disk (not run: no right to mount a small disk)")
    return campaign.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seed", 0), ("kill", 25), ("kill-in-save", 15), ("others", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:

        def report(text: str, rows: dict[str, Row]) -> None:
            print(text, flush=True)
            if args.out:
                args.out.write_text(table(rows))

        rows = run(Path(folder), args.seed, args.kill, args.kill_in_save, args.others, report)
    print(table(rows))


if __name__ == "__main__":
    main()
