"""What must hold after a fault: exit codes, the rank and the file that are named, and no step lost or repeated."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ds.checkpoint.verify import candidates
from tests.faults.processes import BATCH, STEPS, Failed, checkpoints

COMPARED = ("loss", "grad_norm", "images", "capacity_loss")
"""Columns of ``metrics.jsonl`` that do not depend on time."""
NOT_LAUNCHED = ("did not join", "cannot reach", "no answer for")
"""Messages that go with exit code 1: a rank was lost before the ranks had joined."""
TAIL = 4000


@dataclass(frozen=True)
class Expected:
    """What may follow a fault.  A run that has completed in spite of it, with exit code 0, always may."""

    codes: Collection[int] = (85,)
    """Exit codes of the ranks that the campaign did not kill, besides 0."""
    victims: Collection[int] = ()
    """Ranks that the fault has hit: no other one may be named."""
    is_named: bool = True
    """Whether one of `victims` must be named if a rank exits with an error."""
    path: str = ""
    """Must be in the output if a rank exits with an error."""
    says: str = ""
    """Must be in the output in any case."""


def blamed(text: str) -> set[int]:
    """Return the ranks that errors and warnings name as the culprit."""
    found = set()
    for line in text.splitlines():
        if "error: " in line or "WARNING" in line or line.endswith(" is stuck here:"):
            line = re.sub(r"; rank \d+ exits|rank \d+ on \S+ cannot reach", "", line)
            found |= {int(number) for number in re.findall(r"\brank(?:\(s\))? (\d+)", line)}
    return found


def check_end(text: str, codes: Sequence[int], expected: Expected) -> None:
    """Check the exit codes and what the ranks have printed.

    Raises:
        Failed: something is not as expected.
    """
    if "Traceback" in text:
        raise Failed("other", f"a traceback; exit codes {codes}:\n{text[-TAIL:]}")
    wrong = set(codes) - set(expected.codes) - {0}
    if wrong == {1} and 85 in expected.codes and any(sign in text for sign in NOT_LAUNCHED):
        wrong = set()
    if wrong:
        raise Failed("other", f"exit codes {codes}:\n{text[-TAIL:]}")
    named, victims = blamed(text), set(expected.victims)
    if named - victims:
        raise Failed("blame", f"rank(s) {sorted(named)} named, {sorted(victims)} hit:\n{text[-TAIL:]}")
    if any(codes) and victims and expected.is_named and not named:
        raise Failed("blame", f"nobody named, {sorted(victims)} hit; exit codes {codes}:\n{text[-TAIL:]}")
    if any(codes) and expected.path not in text:
        raise Failed("other", f"{expected.path} is not named; exit codes {codes}:\n{text[-TAIL:]}")
    if expected.says not in text:
        raise Failed("other", f"nothing says {expected.says!r}; exit codes {codes}:\n{text[-TAIL:]}")


def announced(text: str) -> int:
    """Return the images of the newest checkpoint that was announced as saved; 0 if none was."""
    lines = [line for line in text.splitlines() if line.strip().startswith("saved  ")]
    return max((int(line.split("images_")[1][:12]) for line in lines), default=0)


def resumed(text: str) -> int:
    """Return the images at which a run continued; 0 if it started from scratch.

    Raises:
        Failed: it does not say.
    """
    starts = re.findall(r"continues \S+ at ([\d,]+) images|starting from scratch", text)
    if not starts:
        raise Failed("other", f"it does not say where it starts:\n{text[-TAIL:]}")
    return int(starts[-1].replace(",", "") or 0)


def check_rows(rows: Sequence[Mapping], expected: Mapping[int, Mapping], *, complete: bool) -> None:
    """Check that every row equals that of the reference, in order and without gaps.

    Raises:
        Failed: a row differs, is missing or occurs twice.
    """
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(rows) + 1)):
        raise Failed("lost", f"steps {steps}")
    for row in rows:
        for key in COMPARED:
            if row[key] != expected[row["step"]][key]:
                raise Failed("lost", f"step {row['step']}: {key} {row[key]} != {expected[row['step']][key]}")
    if complete and len(rows) != STEPS:
        raise Failed("lost", f"{len(rows)} rows for {STEPS} steps")


def check_complete(directory: Path, *, is_clean: bool) -> None:
    """Check the directory of a complete run: its last checkpoint, and nothing that is temporary.

    Args:
        directory: the run directory.
        is_clean: whether nothing temporary may stay.

    Raises:
        Failed: a file is missing or left over.
    """
    newest = checkpoints(directory)[0].name
    used = candidates(directory)[0].name  # also if `latest` could not be written, and names an older one
    if used != newest or int(newest.split("_")[1]) != STEPS * BATCH:
        raise Failed("lost", f"the newest checkpoint is {newest}, commands use {used}")
    left = [*directory.rglob(".*"), *directory.glob("lock.json")]
    if is_clean and left:
        raise Failed("other", f"left behind: {', '.join(map(str, left))}")
