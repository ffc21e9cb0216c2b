"""Inject the faults that occur on clusters into a training run, restart it, and check that nothing was lost.

    python -m tests.faults.driver --seed 0 --kill 25 --kill-in-save 15 --others 10 --out table.md

An undisturbed run of two ranks (EP 2, ZeRO 2) is the reference. A second run of the same configuration is disturbed
repeatedly: each trial starts it, injects one fault at a random time, waits until all processes have exited, and checks
the run directory. When the run is complete, a new one begins. After every trial, the rows of ``metrics.jsonl`` must
equal those of the reference, digit for digit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import LEAVE_LIMIT_S, Campaign, Row
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


class Faults(Campaign):
    """The faults that a trial can inject."""

    def kill(self) -> None:
        """Kill a random rank at a random time."""

        def inject(ranks: Ranks) -> float | None:
            time.sleep(self.random.uniform(0, 3))
            victim = self.random.choice(ranks.processes)
            late = victim.poll() is not None
            ranks.kill(victim)
            return None if late else time.monotonic()

        text = self.trial("SIGKILL of a rank", inject, {85})
        if "complete" not in text and f"{STEPS * BATCH:,} of" not in text and " died in step " not in text:
            raise Failed(f"the dead rank is not named:\n{text[-3000:]}")

    def kill_in_save(self) -> None:
        """Kill a random rank while a checkpoint is being written."""

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
        """Freeze a random rank; the other one exits within the limit."""

        def inject(ranks: Ranks) -> float | None:
            time.sleep(self.random.uniform(0, 2))
            frozen, began = self.random.choice(ranks.processes), time.monotonic()
            late = frozen.poll() is not None
            frozen.send_signal(signal.SIGSTOP)
            other = next(p for p in ranks.processes if p is not frozen)
            try:
                other.wait(LEAVE_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"hangs next to a frozen rank:\n{ranks.stacks()}") from None
            if other.returncode and "has not answered for" not in ranks.text():
                raise Failed(f"the frozen rank is not named:\n{ranks.text()[-3000:]}")
            ranks.kill(frozen)
            return None if late else began

        self.trial("SIGSTOP of a rank", inject, {85})

    def usr1(self) -> None:
        """Send SIGUSR1 to a random rank; the run saves, exits with 85 and loses no step."""

        def inject(ranks: Ranks) -> float:
            time.sleep(self.random.uniform(0, 2))
            self.random.choice(ranks.processes).send_signal(signal.SIGUSR1)
            return time.monotonic()

        self.trial("SIGUSR1 to a rank", inject, {85})
        rows = metrics(self.directory)
        if saved(self.directory) != rows[-1]["images"]:
            raise Failed("a step was lost after SIGUSR1")

    def damage(self, kind: str) -> None:
        """Damage the newest checkpoint; the next start names the file and resumes from the previous checkpoint."""
        while len(checkpoints(self.directory)) < 2 or done(self.directory):
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
            self.wait_for(ranks, "saved  ")  # so that `latest` is valid again
            text = ranks.text()
            self.random.choice(ranks.processes).send_signal(signal.SIGUSR1)
            began = time.monotonic()
            codes = ranks.wait(LEAVE_LIMIT_S)
            row.longest_s = max(row.longest_s, time.monotonic() - began)
        finally:
            ranks.end()
        harmless = kind == "flipped byte" and file.name == "manifest.json" and "WARNING" not in text
        if not harmless and (str(file) not in text or "WARNING" not in text or f"at {expected:,} images" not in text):
            raise Failed(f"{kind} of {file}: not named, or not resumed at {expected:,}:\n{text[-3000:]}")
        if set(codes) - {0, 85}:
            raise Failed(f"{kind}: exit codes {codes}:\n{ranks.text()[-3000:]}")
        self.check_curve(complete=False)
        row.runs += 1
        row.codes |= set(codes)
        row.steps_lost = max(row.steps_lost, (int(newest.name.split("_")[1]) - expected) // BATCH)

    def full_disk(self, disk: Path, on_error: str) -> None:
        """Fill the disk at a random time; the run exits with 5, or continues until there is space again."""
        directory, filler, name = disk / "run", disk / "filler", f"full disk, on_error={on_error}"
        disturbed, self.directory = self.directory, directory

        def inject(ranks: Ranks) -> float:
            if not checkpoints(directory):
                self.wait_for(ranks, "saved  ")  # a checkpoint that the fault could destroy
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
                raise Failed(f"{name}: not reported, or no checkpoint left:\n{text[-3000:]}")
            filler.unlink(missing_ok=True)
        finally:
            self.directory = disturbed


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| fault | runs | longest time until all ranks had exited | exit codes | most steps repeated |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        codes = ", ".join(map(str, sorted(row.codes))) or "-"
        lines.append(f"| {row.fault} | {row.runs} | {row.longest_s:.1f} s | {codes} | {row.steps_lost} |")
    return "\n".join(lines) + "\n"


def run(
    folder: Path, seed: int, kill: int, kill_in_save: int, others: int, report: Callable[[str, dict[str, Row]], None]
) -> dict[str, Row]:
    """Run a campaign with its faults in random order.

    Args:
        folder: where the runs are written.
        seed: of the random choices.
        kill: SIGKILLs at random times.
        kill_in_save: SIGKILLs while a checkpoint is being written.
        others: trials of every other fault.
        report: called after every trial with the progress and the rows so far.

    Raises:
        Failed: a check failed; the message contains the output of the ranks.
    """
    campaign = Faults(folder, seed)
    campaign.reference()
    trials = [campaign.kill] * kill + [campaign.kill_in_save] * kill_in_save
    trials += [campaign.stop, campaign.usr1] * others
    for kind in ("truncated file", "flipped byte", "removed file"):
        trials += [lambda kind=kind: campaign.damage(kind)] * others
    disk = folder / "disk"
    has_disk = mount_small_disk(disk, 8)
    try:
        if has_disk:
            for number in range(max(others, 2)):  # each on_error at least once
                trials.append(lambda n=number: campaign.full_disk(disk, ("stop", "continue")[n % 2]))
        campaign.random.shuffle(trials)
        for number, trial in enumerate(trials):
            campaign.until_counted(trial)
            report(f"{number + 1} of {len(trials)} trials", campaign.rows)
    finally:
        if has_disk:
            unmount(disk)
    if not has_disk:
        campaign.rows["full disk"] = Row("full disk (not run: mounting a small disk is not permitted)")
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
