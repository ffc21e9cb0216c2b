"""What one GPU can show: the tests marked ``gpu``, then the benchmarks, in under 15 minutes; installs nothing.

    make gpu-check
    python -m benchmarks.gpu_check --out gpu_check.json

Each part is a process of its own with a time limit. A part that fails is reported, and the others still run. The file
is rewritten after every part, and the exit code is 1 if a part failed or did not run. Targets that were missed do not
change the exit code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import machine_facts, progress
from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import write_text
from diffmoe_ds.planning.devices import device_reported

NAME = "benchmarks.gpu_check"
ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 870
TAIL = 6000
"""Characters of a part's output that are kept."""

OURS = ("diffmoe", "batch_pool", "per_token")
"""Opponents of the benchmarks whose ratios the final table shows."""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    arguments: tuple[str, ...]
    """Of Python."""
    limit_s: int
    """Seconds after which it is killed."""
    needs: str | None = None
    """A package without which it cannot run."""


PARTS = (
    Part("tests", ("-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"), 420, "pytest"),
    Part("layer", ("-m", "benchmarks.moe_layer", "--json", "--tokens", "65536", "--width", "1024", "--experts", "16",
                   "--dtype", "bf16"), 120),
    Part("step", ("-m", "benchmarks.step", "--json", "--size", "L", "--images", "256", "--micro-batch", "32",
                  "--dtype", "bf16", "--rounds", "7"), 180),
    Part("whole step", ("-m", "benchmarks.step", "--json", "--deepspeed", "--size", "L", "--images", "256",
                        "--micro-batch", "32", "--dtype", "bf16", "--rounds", "3"), 300, "deepspeed"),
    Part("sample", ("-m", "benchmarks.sample", "--json", "--size", "L", "--images", "64", "--dtype", "bf16"), 120),
    Part("layer shapes", ("-m", "benchmarks.moe_layer", "--json"), 120),
    Part("selection", ("-m", "benchmarks.selection", "--json", "--ranks", "1", "--tokens", "8192", "65536"), 60),
)  # fmt: skip

Run = Callable[[Part, float], dict[str, Any]]
"""Runs a part for at most some seconds and returns its result."""


def check(parts: Sequence[Part], run: Run, budget_s: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the parts within a time budget.

    Args:
        parts: in order.
        run: runs one of them.
        budget_s: seconds for all of them.
        save: called with the report after every part.

    Returns:
        The report: ``parts``, each with ``name``, ``status`` (``ok``, ``failed`` or ``not run``), ``seconds`` and its
        output; ``targets``; ``ok``, whether all parts succeeded.
    """
    began = time.monotonic()
    report: dict[str, Any] = {"parts": [], "targets": [], "ok": False}
    for part in parts:
        left = budget_s - (time.monotonic() - began)
        if left < 1:
            result: dict[str, Any] = {"status": "not run", "why": "the time for all parts is used up", "seconds": 0.0}
        elif part.needs is not None and importlib.util.find_spec(part.needs) is None:
            result = {"status": "failed", "why": f"{part.needs} is not installed", "seconds": 0.0}
        else:
            progress(f"gpu-check: {part.name}")
            result = run(part, min(part.limit_s, left))
        report["parts"].append({"name": part.name, **result})
        report["targets"] = targets({entry["name"]: entry.get("report") for entry in report["parts"]})
        report["seconds"] = time.monotonic() - began
        report["ok"] = len(report["parts"]) == len(parts) and all(e["status"] == "ok" for e in report["parts"])
        save(report)
    return report


def run_part(part: Part, limit_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a part in a process group that ends with it.

    Args:
        part: what to run.
        limit_s: seconds after which it is killed.
        environment: its variables.

    Returns:
        ``status``, ``seconds``, ``command``, the end of its ``output`` and, if it prints a JSON object, its ``report``.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        why = None
        try:
            code = process.wait(limit_s)
            why = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            why = f"did not finish within {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    result = {"command": " ".join(["python", *part.arguments]), "seconds": time.monotonic() - began}
    if why is None and "--json" in part.arguments:
        try:
            return {**result, "status": "ok", "report": json.loads(texts[0].splitlines()[-1])}
        except (ValueError, IndexError):
            why = "did not print a JSON object"
    ended = {"status": "ok"} if why is None else {"status": "failed", "why": why}
    return {**result, **ended, "output": texts[0][-TAIL:], "errors": texts[1][-TAIL:]}


# ------------------------------------------------------------------------------------------------------------ targets


def targets(reports: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the results with what they should be.

    Args:
        reports: the benchmarks' reports by part; parts without one are left out.

    Returns:
        ``what``, ``value``, ``bound`` and ``met`` of each target that could be computed.
    """
    found = []
    layer, step = reports.get("layer"), reports.get("step")
    if layer:
        ratio = layer["cases"][0]["opponents"]["diffmoe"]["over"]["dense FFN"]
        found.append(_at_most("layer over dense FFN, T 65,536, D 1,024, E 16, bf16", ratio, 1.1))
    if step:
        case, machine = step["cases"][0], step["machine"]
        ratio = case["opponents"]["batch_pool"]["over"]["dense"]
        found.append(_at_most("L-E16 forward + backward over dense L, 256 images", ratio, 1.15))
        gpu = device_reported(machine["device"])
        if gpu is not None:
            mfu = case["tflop_per_s"]["batch_pool"] * 1e12 / gpu.bf16_flops
            found.append(_at_least("MFU of L-E16", mfu, 0.45))
    return found


def _at_most(what: str, value: float, bound: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bound": f"<= {bound}", "met": value <= bound}


def _at_least(what: str, value: float, bound: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bound": f">= {bound}", "met": value >= bound}


def summary(report: Mapping[str, Any]) -> str:
    """Return the final table: parts, then targets."""
    lines = ["", f"{'part':<14} {'status':<8} {'seconds':>8}  result"]
    for part in report["parts"]:
        lines.append(f"{part['name']:<14} {part['status']:<8} {part['seconds']:>8.1f}  {_headline(part)}")
    lines += ["", f"{'target':<56} {'value':>8} {'bound':>8}  met"] if report["targets"] else []
    for target in report["targets"]:
        met = "yes" if target["met"] else "no"
        lines.append(f"{target['what']:<56} {target['value']:>8.3f} {target['bound']:>8}  {met}")
    return "\n".join(lines)


def _headline(part: Mapping[str, Any]) -> str:
    """Return a part's result in one line: our ratios, or why it failed and the last line of its output."""
    if "report" in part:
        found = []
        for case in part["report"]["cases"]:
            name, row = next((name, row) for name, row in case["opponents"].items() if name in OURS)
            found.append(f"{name} " + ", ".join(f"{ratio:.2f} over {base}" for base, ratio in row["over"].items()))
        return "; ".join(found)
    said = [part["why"]] if "why" in part else []
    for text in ("output", "errors") if said else ("output",):
        said += [line for line in part.get(text, "").splitlines() if line.strip()][-1:]
    return "; ".join(said)


# ------------------------------------------------------------------------------------------------------------ command


@contextmanager
def part_environment() -> Iterator[dict[str, str]]:
    """Yield the variables of the parts: this checkout is importable and, if it is not installed, has a version."""
    with tempfile.TemporaryDirectory() as made:
        paths = [str(ROOT)]
        try:
            version("diffmoe_ds")
        except PackageNotFoundError:
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            number = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
            assert number is not None
            metadata = Path(made) / f"diffmoe_ds-{number[1]}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: diffmoe_ds\nVersion: {number[1]}\n", encoding="utf-8")
            paths.append(made)
        paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print a table and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the GPU tests and benchmarks on one GPU.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check.json"), metavar="FILE", help="results (default: %(default)s)")
    add("--budget-s", type=int, default=BUDGET_S, metavar="S", help="seconds for all parts (default: %(default)s)")
    names = ", ".join(shlex.quote(part.name) for part in PARTS)
    add("--only", nargs="+", metavar="PART", help=f"run these parts only: {names}")
    parser.set_defaults(run=_run, argv=list(sys.argv[1:] if argv is None else argv), failed=False)
    args = parser.parse_args(argv)
    return run_command(args) or int(args.failed)


def _run(args: argparse.Namespace) -> None:
    require_positive(args, "budget_s")
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    if unknown := set(args.only or ()) - {part.name for part in PARTS}:
        raise ConfigError(
            f"--only {' '.join(sorted(unknown))}: no such part; valid: {', '.join(shlex.quote(p.name) for p in PARTS)}."
        )
    if not torch.cuda.is_available():
        raise ConfigError("make gpu-check needs a GPU that torch can use; torch.cuda.is_available() is False.")
    machine = machine_facts(NAME, args.argv)

    def save(report: dict[str, Any]) -> None:
        write_text(args.out, json.dumps({"machine": machine, **report}, indent=1) + "\n")

    with part_environment() as environment:
        report = check(parts, partial(run_part, environment=environment), args.budget_s, save)
    print(summary(report), flush=True)
    progress(f"\n{args.out}")
    args.failed = not report["ok"]


if __name__ == "__main__":
    sys.exit(main())
