"""A campaign: trials of all kinds in an order that the seed decides, their outcomes on disk, and the table."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.faults import file_kinds, process_kinds
from tests.faults.processes import Failed, TooLate
from tests.faults.trial import Ground, Outcome, Trial

KINDS: dict[str, Callable[[Trial], None]] = {
    "SIGKILL of a rank": process_kinds.kill,
    "SIGKILL inside a save": process_kinds.kill_in_save,
    "SIGKILL around a rename, link or fsync": process_kinds.kill_around_a_call,
    "SIGSTOP of a rank": process_kinds.freeze,
    "SIGUSR1 or SIGTERM to a rank": process_kinds.ask_to_stop,
    "killed or frozen loader worker": process_kinds.lose_a_worker,
    "other clocks": process_kinds.shift_the_clock,
    "job that wakes up after it was replaced": process_kinds.wake_a_replaced_job,
    "failing call in a save": file_kinds.fail_a_save,
    "failing call at the start": file_kinds.fail_the_start,
    "failing call for metrics, TensorBoard or samples": file_kinds.fail_the_log,
    "failing call in a resume": file_kinds.fail_a_resume,
    "call that never returns": file_kinds.hang,
    "flipped bit in a checkpoint": partial(file_kinds.damage, how="flip"),
    "truncated file of a checkpoint": partial(file_kinds.damage, how="truncate"),
    "removed file of a checkpoint": partial(file_kinds.damage, how="remove"),
    "full disk": file_kinds.full_disk,
    "foreign files in `checkpoints/`": file_kinds.leave_something,
    "pipe or directory in place of a file": file_kinds.replace_a_control_file,
}
MAX_ATTEMPTS = 8
"""At a fault that comes too late, before a trial counts as not run."""
NOT_RUN = "not run"
HEADINGS = (
    "fault", "runs", "longest time until all ranks had exited", "exit codes", "most steps repeated", "hangs",
    "wrong or no rank named", "steps lost", "other failures",
)  # fmt: skip


def kind_of(seed: int, number: int) -> str:
    """Return the kind of a trial; every ``len(KINDS)`` trials in a row have all of them, in random order."""
    block, index = divmod(number, len(KINDS))
    return random.Random(f"{seed} {block}").sample(list(KINDS), len(KINDS))[index]


def run_trial(ground: Ground, seed: int, number: int) -> Outcome:
    """Run one trial; what is drawn in it depends on the seed and its number only."""
    outcome = Outcome(number, seed, kind_of(seed, number))
    for attempt in range(1, MAX_ATTEMPTS + 1):
        outcome.attempts = attempt
        trial = Trial(ground, outcome, attempt)
        try:
            KINDS[outcome.kind](trial)
            return outcome
        except TooLate:
            outcome.result = NOT_RUN
            continue
        except Failed as failure:
            outcome.result, outcome.message = failure.result, str(failure)
            return outcome
        finally:
            trial.close()
    return outcome


def read_outcomes(path: Path, seed: int) -> list[Outcome]:
    """Return the outcomes of an earlier, interrupted campaign; a line that was cut off is dropped.

    Raises:
        ValueError: they are those of another seed.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    found = [Outcome(**json.loads(line)) for line in whole.splitlines()]
    if {outcome.seed for outcome in found} - {seed}:
        raise ValueError(f"{path}: has trials of another seed; give another --state")
    return found


def run(
    folder: Path, state: Path, seed: int, numbers: Sequence[int], report: Callable[[Outcome, int], None]
) -> list[Outcome]:
    """Run the trials that an interrupted campaign has not run yet; return the outcomes of all.

    Args:
        folder: where the runs are written; empty.
        state: directory of ``trials.jsonl``, to which every trial appends its outcome.
        seed: of the random choices.
        numbers: the trials.
        report: called after every trial, also those of before, with its outcome and the number of trials left.
    """
    state.mkdir(parents=True, exist_ok=True)
    path = state / "trials.jsonl"
    outcomes = [outcome for outcome in read_outcomes(path, seed) if outcome.number in numbers]
    done = {outcome.number for outcome in outcomes}
    left = [number for number in numbers if number not in done]
    for outcome in outcomes:
        report(outcome, len(left))
    if not left:
        return outcomes
    ground = Ground(folder)
    try:
        for count, number in enumerate(left, 1):
            outcome = run_trial(ground, seed, number)
            with path.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            outcomes.append(outcome)
            report(outcome, len(left) - count)
    finally:
        ground.close()
    return outcomes


def table(outcomes: Iterable[Outcome]) -> str:
    """Return a table of the outcomes by kind, in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    every = list(outcomes)
    for kind in KINDS:
        rows = [outcome for outcome in every if outcome.kind == kind and outcome.result != NOT_RUN]
        if not rows:
            continue
        codes = ", ".join(map(str, sorted({code for row in rows for code in row.codes}))) or "-"
        failures = " | ".join(
            str(sum(row.result == result for row in rows)) for result in ("hang", "blame", "lost", "other")
        )
        lines.append(
            f"| {kind} | {len(rows)} | {max(row.seconds for row in rows):.1f} s | {codes} | "
            f"{max(row.repeated for row in rows)} | {failures} |"
        )
    return "\n".join(lines) + "\n"
