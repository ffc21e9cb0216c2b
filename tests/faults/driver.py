"""Inject the faults that occur on clusters into training runs, start them again, and check that nothing was lost.

    python -m tests.faults.driver --seed 1 --faults 1000 --state faults-1 --out table.md

Every trial has two ranks (EP 2, ZeRO 2) and a run directory of its own: a new one, or a copy of that of a run which has
saved checkpoints. It starts the ranks, injects one fault, waits until all have exited, and starts the run again, which
must complete. The exit codes must be those of the documentation, the messages must name the rank that was hit, and the
rows of ``metrics.jsonl`` must equal those of an undisturbed run, digit for digit, from the last save on.

The seed and the number of a trial decide what happens in it: ``--only NUMBER`` repeats one. An interrupted campaign
goes on where it was if it is given the same ``--state``. Failures are collected; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from tests.faults.campaign import append_outcome, read_outcomes, run_trials, table
from tests.faults.trial import NOT_RUN, PASSED, Outcome


def campaign(
    folder: Path, state: Path | None, seed: int, numbers: Sequence[int], out: Path | None = None
) -> list[Outcome]:  # fmt: skip
    """Run a campaign with a progress bar, and print what fails.

    Args:
        folder: where the runs are written; empty.
        state: directory of ``trials.jsonl``, to which every trial appends its outcome, and whose trials are not
            repeated; None for none.
        seed: of the random choices.
        numbers: the trials.
        out: file for the table, which is updated after every trial.

    Returns:
        The outcomes of all trials, also of those that an earlier call has run.
    """
    log = None if state is None else state / "trials.jsonl"
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    outcomes = [] if log is None else [each for each in read_outcomes(log, seed) if each.number in numbers]
    done = {outcome.number for outcome in outcomes}
    left = [number for number in numbers if number not in done]
    with tqdm(total=len(numbers), initial=len(done), unit="trial", smoothing=0.05) as bar:
        for outcome in run_trials(folder, seed, left):
            outcomes.append(outcome)
            bar.update()
            if outcome.result not in (PASSED, NOT_RUN):
                bar.write(describe(outcome), file=sys.stdout)
            if log is not None:
                append_outcome(log, outcome)
            if out is not None:
                out.write_text(table(outcomes))
    return outcomes


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """Return a line for every trial that has failed."""
    return [describe(outcome).splitlines()[0] for outcome in outcomes if outcome.result not in (PASSED, NOT_RUN)]


def describe(outcome: Outcome) -> str:
    """Return what has failed, and how to repeat it."""
    again = f"python -m tests.faults.driver --seed {outcome.seed} --only {outcome.number}"
    what = f"trial {outcome.number} of seed {outcome.seed}, {outcome.kind} ({outcome.detail}): {outcome.result}"
    return f"{what}: {outcome.message}\nrepeat it with: {again}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=1000, help="number of trials")
    parser.add_argument("--only", type=int, help="run this trial alone, and leave --state as it is")
    parser.add_argument("--state", type=Path, help="directory of the outcomes; a campaign goes on with what it has")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    numbers = range(args.faults) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        state = args.state if args.only is None else None
        outcomes = campaign(Path(folder), state, args.seed, numbers, args.out)
    for outcome in outcomes if args.only is not None else ():
        print(outcome)
    print(table(outcomes))
    failed = failures(outcomes)
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
