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
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.faults.campaign import NOT_RUN, run, table
from tests.faults.trial import Outcome


def campaign(folder: Path, state: Path, seed: int, numbers: Sequence[int], out: Path | None = None) -> list[Outcome]:
    """Run a campaign with a progress bar, and print what has failed.

    Args:
        folder: where the runs are written; empty.
        state: directory of the outcomes.
        seed: of the random choices.
        numbers: the trials.
        out: file for the table, which is updated after every trial.
    """
    outcomes: list[Outcome] = []
    with tqdm(total=len(numbers), unit="trial", smoothing=0.05) as bar:

        def report(outcome: Outcome, left: int) -> None:
            outcomes.append(outcome)
            if outcome.result not in ("passed", NOT_RUN):
                bar.write(describe(outcome), file=sys.stdout)
            if left == len(numbers) - len(outcomes):  # else it is one of an earlier call
                bar.update(len(numbers) - left - bar.n)
            if out:
                out.write_text(table(outcomes))

        return run(folder, state, seed, numbers, report)


def describe(outcome: Outcome) -> str:
    """Return what has failed, and how to repeat it."""
    again = f"python -m tests.faults.driver --seed {outcome.seed} --only {outcome.number}"
    what = f"trial {outcome.number} of seed {outcome.seed}, {outcome.kind} ({outcome.detail}): {outcome.result}"
    return f"{what}: {outcome.message}\nrepeat it with: {again}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=1000, help="number of trials")
    parser.add_argument("--only", type=int, help="run this trial alone, and leave --state as it is")
    parser.add_argument("--state", type=Path, help="directory of the outcomes; a campaign goes on with what it has")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    numbers = range(args.faults) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        state = args.state if args.state and args.only is None else Path(folder) / "state"
        (Path(folder) / "runs").mkdir()
        outcomes = campaign(Path(folder) / "runs", state, args.seed, numbers, args.out)
    print(table(outcomes))
    for outcome in outcomes:
        if args.only is not None or outcome.result == NOT_RUN:
            print(f"trial {outcome.number}: {outcome}")
    return int(any(outcome.result not in ("passed", NOT_RUN) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
