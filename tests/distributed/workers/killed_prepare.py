"""Prepare a dataset on one rank, on several, and on several that are killed repeatedly, and compare the bytes.

    python -m tests.distributed.workers.killed_prepare --images 10000 --kills 5

Prints one JSON object.  Processes are killed (SIGKILL) by PID at random times.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.data import photographs, tiny_dinov2, tiny_vae, tree
from tests.helpers.encoders import tiny_encoder
from tests.helpers.processes import REPOSITORY, clean_environment

TIMEOUT = 3000
MOMENT = 2.0
"""Longest delay of a kill after its target number of shards, in measured seconds per shard."""


def start(arguments: list[str], world: int, output: Path) -> list[subprocess.Popen]:
    """The ranks of one launch, as a launcher would start them."""
    processes = []
    for rank in range(world):
        environment = clean_environment(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        with open(output, "ab") as file:
            command = [sys.executable, "-m", "diffmoe_ds.cli", "prepare", *arguments]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
            )
    return processes


def kill(processes: list[subprocess.Popen]) -> None:
    """Kill all running processes."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def finish(arguments: list[str], world: int, output: Path) -> float:
    """Run a launch to completion and return the seconds it took."""
    began = time.monotonic()
    processes = start(arguments, world, output)
    try:
        codes = [process.wait(max(0.0, began + TIMEOUT - time.monotonic())) for process in processes]
    finally:
        kill(processes)
    assert not any(codes), output.read_text()[-3000:]
    return time.monotonic() - began


def interrupt(arguments: list[str], world: int, output: Path, shards: int, delay: float) -> int:
    """Start, wait until a number of shards is done plus a moment, then kill; return the number of finished shards."""
    began, parts = time.monotonic(), Path(arguments[-1]) / "parts"
    processes = start(arguments, world, output)
    try:
        while len(list(parts.glob("0*.json"))) < shards:
            assert time.monotonic() < began + TIMEOUT and any(p.poll() is None for p in processes), output.read_text()
            time.sleep(0.02)
        time.sleep(delay)
    finally:
        kill(processes)
    return len(list(parts.glob("0*.json")))


def seconds_per_shard(prepared: Path) -> float:
    """Mean seconds per shard of a finished launch, excluding startup."""
    times = sorted(path.stat().st_mtime for path in prepared.glob("*.tar"))
    return (times[-1] - times[0]) / (len(times) - 1)


def main() -> None:
    """Run the three preparations and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("latents", "text"), default="latents")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--shard-images", type=int, default=250)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    times = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        images = photographs(folder / "photographs", options.images, size=options.size + 8, classes=10)
        if options.kind == "text":
            for number, path in enumerate(sorted(images.rglob("*.jpg"))):
                path.with_suffix(".txt").write_text(f"a red car {number}\nthe house" if number % 2 else "blue")
            encoder = ["--encoder", str(tiny_encoder("bert"))]
        else:
            encoder = ["--vae", str(tiny_vae(folder / "vae")), "--features", str(tiny_dinov2(folder / "dinov2"))]
        common = [options.kind, "--images", str(images), *encoder, "--size", str(options.size)]
        common += ["--shard-images", str(options.shard_images), "--out"]
        log = folder / "log"
        worlds = {"one": 1, "more": options.ranks}
        seconds = {name: finish([*common, str(folder / name)], world, log) for name, world in worlds.items()}
        arguments, done = [*common, str(folder / "killed")], [0]
        shards = -(-options.images // options.shard_images)
        moment = MOMENT * seconds_per_shard(folder / "more")
        for number in range(options.kills):
            # So that work is left for the later kills and for the end.
            target = done[-1] + times.randint(1, max(1, (shards - done[-1]) // (options.kills - number + 2)))
            done.append(interrupt(arguments, options.ranks, log, target, times.uniform(0, moment)))
            assert done[-1] < shards, "no work was left to interrupt; use more images"
        finish(arguments, options.ranks, log)
        one, more, killed = (tree(folder / name) for name in ("one", "more", "killed"))
        report = {
            "images": options.images,
            "shards": sum(name.endswith(".tar") for name in one),
            "bytes": sum(map(len, one.values())),
            "seconds_1_rank": round(seconds["one"], 1),
            "ranks": options.ranks,
            "seconds": round(seconds["more"], 1),
            "shards_done_at_each_kill": done[1:],
            "same_on_more_ranks": more == one,
            "same_after_kills": killed == one,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
