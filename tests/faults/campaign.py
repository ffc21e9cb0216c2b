"""A campaign: trials of all kinds in an order that the seed decides, their outcomes on disk, and the table."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.faults import file_kinds, process_kinds
from tests.faults.processes import LEAVE_LIMIT_S, Failed, TooLate
from tests.faults.trial import NOT_RUN, PASSED, Ground, Outcome, Trial

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
HEADINGS = (
    "fault", "runs", "longest time until all ranks had exited", "exit codes", "most steps repeated", "hangs",
    "wrong or no rank named", "steps lost", "other failures",
)  # fmt: skip


def kind_of(seed: int, number: int) -> str:
    """Return the kind of a trial; every ``len(KINDS)`` trials in a row have all of them, in random order."""
    block, index = divmod(number, len(KINDS))
    return random.Random(f"{seed} {block}").sample(list(KINDS), len(KINDS))[index]


def run_trials(folder: Path, seed: int, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Run trials one after the other.

    Args:
        folder: where the runs are written; empty.
        seed: of the random choices.
        numbers: the trials; what is drawn in each depends on the seed and its number only.

    Yields:
        The outcome of each.
    """
    if not numbers:
        return
    ground = Ground(folder)
    try:
        for number in numbers:
            yield run_trial(ground, Outcome(number, seed, kind_of(seed, number)))
    finally:
        ground.close()


def run_trial(ground: Ground, outcome: Outcome) -> Outcome:
    """Run a trial, again if its fault comes too late, and fill in its outcome."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        outcome.attempts, outcome.result = attempt, PASSED
        trial = Trial(ground, outcome, attempt)
        try:
            KINDS[outcome.kind](trial)
            break
        except TooLate:
            outcome.result = NOT_RUN
        except Failed as failure:
            outcome.result, outcome.message = failure.result, str(failure)
            if failure.result == "hang":
                outcome.seconds = LEAVE_LIMIT_S
            break
        finally:
            trial.close()
    return outcome


def read_outcomes(path: Path, seed: int) -> list[Outcome]:
    """Return the outcomes of an interrupted campaign; a line that was cut off is removed.

    Raises:
        ValueError: they are those of another seed.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    found = [Outcome(**json.loads(line)) for line in whole.splitlines()]
    if any(outcome.seed != seed for outcome in found):
        raise ValueError(f"{path}: has trials of another seed")
    return found


def append_outcome(path: Path, outcome: Outcome) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


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
