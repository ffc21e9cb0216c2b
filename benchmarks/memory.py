"""Host memory of a rank and of its loader workers, and of processes that only import the same modules.

A small model trains on the embedded images. Sizes are anonymous memory in MiB: pages of programs and libraries on the
disk are not counted. A worker is forked from its rank; of its pages, only the private ones are additional. They are
compared with those of a worker of torch's that reads nothing.

    python -m benchmarks.memory --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

STEPS = 100
MEASURED_AFTER = 20
"""Steps after which the run is measured."""
TIMEOUT_S = 300
TRAINED = """
import json, sys
from diffmoe_ds.cli import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(list(sys.modules), file)
sys.exit(code)
"""
IMPORTED = """
import contextlib, importlib, json, sys
import torch, deepspeed  # first, because their parts cannot be imported alone
with open(sys.argv[1]) as file:
    names = json.load(file)
for name in names:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
print("imported", flush=True)
sys.stdin.readline()
items = iter(torch.utils.data.DataLoader([None] * 100, batch_size=None, num_workers=1, multiprocessing_context="fork"))
for _ in range(20):
    next(items)
print("forked", flush=True)
sys.stdin.readline()
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="loader workers of the rank (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), args.workers)
    if args.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{key:>22}  {value}" for key, value in report.items()))
    return 0


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Return ``imports_mb``, ``rank_mb``, ``rank_above_imports_mb``, and the private memory of workers."""
    modules = folder / "modules.json"
    rank, private = _trained(folder / "run", modules, workers)
    imports, idle = _imported(modules)
    return {
        "imports_mb": round(imports, 1),
        "rank_mb": round(rank, 1),
        "rank_above_imports_mb": round(rank - imports, 1),
        "workers_private_mb": [round(size, 1) for size in private],
        "idle_worker_private_mb": round(idle, 1),
    }


def _trained(run: Path, modules: Path, workers: int) -> tuple[float, list[float]]:
    """Return the memory of a rank and the private memory of its workers, and write the names of its modules."""
    values = [
        "model.name=nano-E4", "model.patch_size=8", f"run.total_images={STEPS * 32}", "run.log_every_images=32",
        "run.sample_every_images=0", f"data.num_workers={workers}",
    ]  # fmt: skip
    command = [sys.executable, "-c", TRAINED, str(modules), "train", "--run-dir", str(run), "--set", *values]
    with _running(command) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while _rows(run) < MEASURED_AFTER:
            assert process.poll() is None and time.monotonic() < deadline, "the run has failed"
            time.sleep(0.1)
        rank, private = _sizes(process.pid)["Anonymous"], _private(process.pid)
        assert process.wait(TIMEOUT_S) == 0, "the run has failed"
    return rank, private


def _imported(modules: Path) -> tuple[float, float]:
    """Return the memory of a process that imports some modules, and the private memory of an idle worker of it."""
    with _running([sys.executable, "-c", IMPORTED, str(modules)]) as process:
        assert process.stdin is not None
        _wait_for("imported", process)
        imports = _sizes(process.pid)["Anonymous"]
        process.stdin.write("\n")
        process.stdin.flush()
        _wait_for("forked", process)
        (idle,) = _private(process.pid)
        return imports, idle


def _wait_for(word: str, process: subprocess.Popen[str]) -> None:
    """Wait until a process prints a word."""
    assert process.stdout is not None
    while word not in process.stdout.readline():
        assert process.poll() is None, "the modules cannot be imported"


def _private(pid: int) -> list[float]:
    """Return the private memory of each worker of a process."""
    workers = map(_sizes, [child.pid for child in psutil.Process(pid).children()])
    return [sizes["Private_Clean"] + sizes["Private_Dirty"] for sizes in workers]


@contextlib.contextmanager
def _running(command: list[str]) -> Any:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _sizes(pid: int) -> dict[str, float]:
    """Return the sums over all mappings of a process, in MiB."""
    _, *lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {name: int(size.split()[0]) / 2**10 for name, _, size in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    raise SystemExit(main())
