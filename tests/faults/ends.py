"""Run many processes that use process groups, and count those that do not exit with code 0.

A process whose gloo threads outlive the interpreter is killed by SIGABRT only on some exits (see
`diffmoe_ds.distributed.shutdown`), so this runs the same commands repeatedly:

    python -m tests.faults.ends --ends 200 --ranks 2 3 4
"""

from __future__ import annotations

import argparse
import atexit
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from diffmoe_ds.distributed.shutdown import LEFT
from tests.helpers.data import photographs
from tests.helpers.processes import (
    REPOSITORY,
    WORKERS,
    Finished,
    ForkServer,
    free_port,
    rank_environment,
    run_together,
)
from tests.helpers.training import training_arguments, write_json

COMMAND = ("-m", "diffmoe_ds.cli")
LIMIT_S = 120
"""Seconds for one launch."""
STAGES = (0, 1, 2, 3)
WORKERS_THAT_END = ("selection", "exchange")


@dataclass
class Ends:
    """How the processes of one command have exited so far."""

    command: str
    processes: int = 0
    failures: list[str] = field(default_factory=list)
    """Output of each launch in which a process failed or hung."""
    left: int = 0
    """Launches in which threads of process groups remained at exit, so that a process skipped its finalization."""
    longest_s: float = 0.0
    """The longest launch."""


class Campaign:
    """Launches of every command, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "trained"
        self.rows: dict[str, Ends] = {}

    def commands(self, world: int) -> dict[str, list[str]]:
        """Return the Python arguments of each command by name."""
        found = {f"train, ZeRO {stage}": self._train(world, stage) for stage in STAGES}
        sampling = ("--checkpoint", str(self.checkpoint), "--num-images", "5", "--steps", "1")
        found["sample"] = [*COMMAND, "sample", *sampling, "--out", str(self.folder / "samples")]
        preparing = ("--images", str(self.folder / "photographs"), "--size", "8", "--shard-images", "3")
        found["prepare"] = [*COMMAND, "prepare", "images", *preparing, "--out", str(self._new("prepared"))]
        for name in WORKERS_THAT_END[: 1 if world % 2 else 2]:  # `exchange` shards experts over pairs of ranks
            found[name] = [str(WORKERS / f"{name}.py")]
        return found

    def launch(self, name: str, world: int, arguments: list[str]) -> None:
        """Start a command on ``world`` ranks and record how its processes exited."""
        row = self.rows.setdefault(name, Ends(name))
        start = time.monotonic()
        try:
            finished = start_ranks(world, arguments)
            row.left += LEFT in finished.output
            if finished.code:
                row.failures.append(f"{world} ranks, exit code {finished.code}:\n{finished.output[-3000:]}")
        except BaseException as hung:  # pytest's outcome is not an Exception
            if isinstance(hung, KeyboardInterrupt):
                raise
            row.failures.append(f"{world} ranks: {hung}")
        row.longest_s = max(row.longest_s, time.monotonic() - start)
        row.processes += world

    def _train(self, world: int, stage: int) -> list[str]:
        batch, ep = 4 * world, 2 if world % 2 == 0 else 1
        config = write_json(self.folder / f"zero_{stage}_{world}.json", ep, stage, train_batch_size=batch)
        short = (f"run.total_images={2 * batch}", "checkpoint.keep_last=1")
        return [*COMMAND, "train", *training_arguments(config, self._new(f"zero_{stage}"), *short)]

    def _new(self, name: str) -> Path:
        """Return a path that no earlier launch used: a finished run would not train again."""
        return self.folder / f"{name}_{sum(row.processes for row in self.rows.values())}"


def start_ranks(world: int, arguments: list[str]) -> Finished:
    """Run Python on ``world`` ranks, whose imports happen in the same order as in a new interpreter.

    That order matters here: a fork of a process that has imported everything, as `run_ranks` starts it, has other
    references to its groups. Only torch and DeepSpeed, which are imported before any group exists, are shared.
    """
    port = free_port()
    server = _server()
    environments = [rank_environment(rank, world, port) for rank in range(world)]
    return run_together([lambda file, e=e: server.start(arguments, e, REPOSITORY, file) for e in environments], LIMIT_S)


@cache
def _server() -> ForkServer:
    server = ForkServer(("torch", "deepspeed"))
    atexit.register(server.close)
    return server


def run(folder: Path, ends: int, ranks: Sequence[int]) -> dict[str, Ends]:
    """Start commands until ``ends`` processes of each have ended, on each number of ranks in turn.

    ``train`` and the workers have several kinds, which share that number.

    Returns:
        The counts by command.
    """
    campaign = Campaign(folder)
    arguments = training_arguments(None, campaign.checkpoint, "run.total_images=16")
    prepared = start_ranks(1, [*COMMAND, "train", *arguments])
    assert prepared.code == 0, prepared.output
    photographs(folder / "photographs", 12, size=16)
    turn = 0
    while turn < len(ranks) or any(row.processes < share(name, ends) for name, row in campaign.rows.items()):
        world = ranks[turn % len(ranks)]
        for name, command in campaign.commands(world).items():
            if name not in campaign.rows or campaign.rows[name].processes < share(name, ends):
                campaign.launch(name, world, command)
        turn += 1
        print(f"{sum(row.processes for row in campaign.rows.values())} processes have ended", flush=True)
    return campaign.rows


def share(name: str, ends: int) -> int:
    """Return how many processes of one kind have to end, for ``ends`` of its command."""
    kinds = len(STAGES) if name.startswith("train") else len(WORKERS_THAT_END) if name in WORKERS_THAT_END else 1
    return -(-ends // kinds)


def table(rows: dict[str, Ends]) -> str:
    """Return the counts as a table in Markdown."""
    lines = [
        "| command | processes that ended | failed launches | launches with threads left | longest launch |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        lines.append(f"| {row.command} | {row.processes} | {len(row.failures)} | {row.left} | {row.longest_s:.1f} s |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", type=int, default=200, help="processes per command (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="default: 2 3 4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ends-") as folder:
        rows = run(Path(folder), args.ends, args.ranks)
    for row in rows.values():
        for failure in row.failures:
            print(f"{row.command}, {failure}\n")
    print(table(rows))
    return int(any(row.failures or row.left for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
