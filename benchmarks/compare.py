"""What the benchmarks share: opponents that take turns, their memory, facts about the machine, tables and JSON.

Legend of the results: ``median_ms``, ``q1_ms`` and ``q3_ms`` (quartiles) are milliseconds of a call, ``peak_mb`` is the
peak of live tensor memory during a call above what was live before it, in units of 10^6 bytes, and ``over`` has the
ratio of medians to each baseline.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_SAMPLE_S = 0.02
"""A sample repeats calls that are shorter than this."""

Opponents = Mapping[str, Callable[[], object]]
"""Functions without arguments, by name. Each call must do the same work."""


# ------------------------------------------------------------------------------------------------------- measurements


def compare(
    opponents: Opponents,
    *,
    rounds: int,
    device: torch.device,
    baselines: Sequence[str] = (),
    calls: int | None = None,
    before: Callable[[], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Let the opponents take turns, in an order that reverses every round, after two calls to warm up.

    Args:
        opponents: what to measure; their memory is measured in one further call.
        rounds: samples of each opponent.
        device: where they run; times on a GPU are those between two events.
        baselines: the opponents whose medians the others are divided by; those that are missing are left out.
        calls: calls of each sample; if None, as many as `MIN_SAMPLE_S` takes.
        before: called before every sample, for example a barrier.

    Returns:
        A row for each opponent; see the legend above.
    """
    repeats = {}
    for name, run in opponents.items():
        run()
        once = _seconds(run, 1, device)
        repeats[name] = calls or max(1, math.ceil(MIN_SAMPLE_S / once))
    samples: dict[str, list[float]] = {name: [] for name in opponents}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, run in list(opponents.items())[:: -1 if number % 2 else 1]:
                if before is not None:
                    before()
                samples[name].append(_seconds(run, repeats[name], device) * 1e3)
    finally:
        gc.enable()
    rows: dict[str, dict[str, Any]] = {}
    for name, run in opponents.items():
        rows[name] = {**spread(samples[name]), "peak_mb": peak_bytes(run, device) / 1e6}
    for row in rows.values():
        row["over"] = {name: row["median_ms"] / rows[name]["median_ms"] for name in baselines if name in rows}
    return rows


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the samples."""
    several = milliseconds if len(milliseconds) > 1 else [*milliseconds, *milliseconds]
    q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
    return {"median_ms": median, "q1_ms": q1, "q3_ms": q3}


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the seconds of one of ``calls`` consecutive calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of live tensor bytes during a call, above those that were live before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    live = LiveBytes()
    with live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its new storages; those of its arguments exist already."""
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._remember(storage, 0)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._remember(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def free(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------------------------------- options and the machine


def add_common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of every benchmark."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, metavar="R", help="samples of each opponent (default: %(default)s)")
    add("--quick", action="store_true", help="tiny shapes and two rounds, to check that the benchmark runs")
    add("--json", action="store_true", help="print one JSON object")


def run_benchmark(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None, rounds: int
) -> int:
    """Parse the command line with the common options, run a benchmark and return the exit code.

    Args:
        parser: with the benchmark's own options.
        run: measures and prints; its arguments have the command line in ``argv``.
        argv: the command line; that of the process if None.
        rounds: default of ``--rounds``.
    """
    add_common_options(parser, rounds)
    parser.set_defaults(run=run, argv=list(sys.argv[1:] if argv is None else argv))
    return run_command(parser.parse_args(argv))


def print_cases(name: str, args: argparse.Namespace, cases: Sequence[Mapping[str, Any]], **facts: float) -> None:
    """Print the report of a benchmark.

    Args:
        name: its module.
        args: its arguments.
        cases: what it measured.
        facts: about the machine, besides `machine_facts`.
    """
    machine = {**machine_facts(name, args.argv), **facts}
    report = {"benchmark": name.rpartition(".")[2], "machine": machine, "rounds": args.rounds, "cases": cases}
    print_report(report, args.json)


def common_settings(args: argparse.Namespace) -> torch.device:
    """Check the common options, apply ``--threads`` and ``--quick``, and return the device.

    Raises:
        ConfigError: a number is not positive.
    """
    require_positive(args, "rounds")
    if args.quick:
        args.rounds = 2
    threads = getattr(args, "threads", None)
    if isinstance(threads, int):
        require_positive(args, "threads")
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_positive_list(name: str, values: Sequence[int]) -> None:
    """Check an option with several numbers.

    Raises:
        ConfigError: a number is less than 1.
    """
    for value in values:
        if value < 1:
            raise ConfigError(f"{name} must be positive, got {value}.")


def machine_facts(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return what a result depends on: processor, device, versions, date and command. No host name.

    Args:
        name: the module that measures.
        argv: its arguments.
    """
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", name, *argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts.update(device=gpu.name, gpus=torch.cuda.device_count(), gpu_memory_gb=gpu.total_memory / 1e9)
    return facts


def cpu_model() -> str:
    """Return the processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------------ results


def progress(text: str) -> None:
    """Print a line on stderr about what runs now."""
    print(text, file=sys.stderr, flush=True)


def print_report(report: Mapping[str, Any], as_json: bool) -> None:
    """Print a report as one JSON object, or its cases as tables.

    Args:
        report: with ``machine`` and ``cases``; a case has a title, ``case``, and ``opponents``, the rows of `compare`.
        as_json: which of the two.
    """
    if as_json:
        print(json.dumps(report), flush=True)
        return
    facts = report["machine"]
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['device']}, torch {facts['torch']}, {facts['date']}")
    for case in report["cases"]:
        print(f"\n{case['case']}\n" + "\n".join(table(case["opponents"])))
        for key, value in case.items():
            if key not in ("case", "opponents"):
                print(f"  {key}: {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        items = (f"{key} [{_plain(v)}]" if isinstance(v, Mapping) else f"{key} {_plain(v)}" for key, v in value.items())
        return ", ".join(items) or "none"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of opponents: times, spread, memory and ratios."""
    baselines = list(dict.fromkeys(name for row in rows.values() for name in row["over"]))
    heads = [f"over {name}" for name in baselines]
    width = max(map(len, rows), default=0)
    lines = [f"  {'':<{width}} {'median':>12} {'quartiles':>22} {'peak':>12}  " + "  ".join(heads)]
    for name, row in rows.items():
        quartiles = f"{row['q1_ms']:,.2f} - {row['q3_ms']:,.2f}"
        ratios = "  ".join(
            f"{row['over'][base]:>{len(head)}.3f}" if base in row["over"] else " " * len(head)
            for base, head in zip(baselines, heads, strict=True)
        )
        lines.append(
            f"  {name:<{width}} {row['median_ms']:>9,.2f} ms {quartiles:>22} {row['peak_mb']:>9,.1f} MB  {ratios}"
        )
    return lines
