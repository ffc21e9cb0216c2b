"""The plan as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from diffmoe_ds.planning.traffic import size_text

WIDTH = 14
"""Width of the labels on the left."""


def plan_table(plan: dict[str, Any]) -> str:
    """Return the plan as a page of text.

    Args:
        plan: of `summary.plan_summary`.
    """
    parts = [_model(plan), _memory(plan), _traffic(plan), _time(plan), _advice(plan)]
    if "simulation" in plan:
        parts.append(_simulation(plan))
    return "\n\n".join("\n".join(part) for part in parts)


def _line(label: str, text: str) -> str:
    wrap = textwrap.TextWrapper(
        100, initial_indent=f"{label:<{WIDTH}}", subsequent_indent=" " * WIDTH, break_on_hyphens=False
    )
    return wrap.fill(text)


def _rows(rows: Iterable[tuple[str, ...]], widths: tuple[int, ...]) -> list[str]:
    """Return a table: the first column is aligned to the left, numbers to the right, a last column to the left."""
    lines = []
    for first, *numbers, last in rows:
        middle = "".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
        lines.append(f"  {first:<{widths[0]}}{middle}  {last}".rstrip())
    return lines


def _model(plan: dict[str, Any]) -> list[str]:
    millions = {key: f"{plan[key] / 1e6:,.1f} M" for key in plan if key.startswith("params_")}
    flops, training = plan["flops_per_image"] / 1e9, plan["flops_per_image_training"] / 1e9
    is_on = ", activation checkpointing" if plan["activation_checkpointing"] else ""
    assumed = [f"{key}={json.dumps(value)}" for key, value in plan["assumed"].items()]
    text = [f"{tokens} tokens of width {width}, pooled {pooled}" for tokens, width, pooled in plan["text_encoders"]]
    return [
        _line("model", f"{plan['model']}, {plan['routing']}, pool {plan['pool']}"),
        *([_line("text", "; ".join(text))] if text else []),
        *([_line("assumed", f"{', '.join(assumed)}; a run takes these from the training set")] if assumed else []),
        _line(
            "layout",
            f"{plan['world']:,} GPUs, {plan['gpus_per_node']} per node; ep {plan['ep_size']}, "
            f"ZeRO {plan['zero_stage']}, {plan['dtype']}{is_on}",
        ),
        _line(
            "batch",
            f"{plan['global_batch']} images = {plan['micro_batch']} per GPU x {plan['accumulation']} micro-step(s) x "
            f"{plan['world']} GPUs",
        ),
        _line(
            "parameters",
            f"{millions['params_total']} total, {millions['params_activated']} activated per token, "
            f"{millions['params_touched']} with routers; {millions['params_per_rank']} per GPU",
        ),
        _line("operations", f"{flops:,.1f} GFLOP per image forward, {training:,.1f} in training"),
    ]


_MEANING = {
    "weights": "in the dtype of the forward pass",
    "master_weights": "fp32",
    "adam_moments": "fp32",
    "ema": "fp32",
    "gradients": "and the copies that are reduced",
    "buckets": "DeepSpeed's buffers for gradients",
    "activations": "saved for the backward pass",
    "temporary": "intermediate results, gathered weights",
}


def _memory(plan: dict[str, Any]) -> list[str]:
    parts = plan["memory_parts_gb"]
    rows = [(name.replace("_", " "), f"{size:.2f}", _MEANING[name]) for name, size in parts.items() if size]
    rows.append(("total", f"{plan['memory_per_rank_gb']:.2f}", f"peak, in the {plan['memory_peak_phase']} phase"))
    with_, without = plan["activations_checkpointing_gb"], plan["activations_gb"]
    host = f"{plan['host_checkpoint_gb']:.2f} GB per GPU for checkpoints"
    if plan["host_optimizer_gb"]:
        host += f", {plan['host_optimizer_gb']:.2f} GB for the offloaded optimizer"
    gpus = plan["gpus"].items()
    fitting = [f"{name} ({found['free_gb']:.0f} GB free)" for name, found in gpus if found["fits"]]
    short = [f"{name} ({-found['free_gb']:.0f} GB short)" for name, found in gpus if found["free_gb"] < 0]
    tight = [name for name, found in gpus if not found["fits"] and found["free_gb"] >= 0]
    verdict = "fits" if plan["fits"] else "does not fit"
    return [
        "memory per GPU, GB",
        *_rows(rows, (16, 8)),
        _line("activations", f"{without:.2f} GB, {with_:.2f} GB with activation checkpointing"),
        _line("of which", f"{plan['dispatch_buffers_gb']:.2f} GB are rows sent to experts and back"),
        _line("host memory", host),
        _line("resume", _resume(plan)),
        _line("verdict", f"{verdict} on {plan['gpu']}"),
        _line("fits on", ", ".join(fitting) or "none of the supported GPUs"),
        *([_line("tight on", f"{', '.join(tight)}: no room for the CUDA context and fragmentation")] if tight else []),
        *([_line("too small", ", ".join(short))] if short else []),
    ]


def _resume(plan: dict[str, Any]) -> str:
    read, exchanged, host = (
        size_text(round(1e9 * plan[f"resume_{name}_gb"])) for name in ("read", "exchanged", "host")
    )
    return f"reads {read} per GPU in {plan['resume_opens']} opens, exchanges {exchanged}, needs {host} of host memory"


def _traffic(plan: dict[str, Any]) -> list[str]:
    rows = [
        (m["purpose"], m["collective"], f"{m['ranks']:,}", f"{m['calls']:,}", size_text(m["bytes"]), "")
        for m in plan["collectives"]
    ]
    return [
        "collectives per GPU and optimizer step",
        *_rows([("purpose", "collective", "GPUs", "calls", "bytes", ""), *rows], (18, 15, 7, 8, 12)),
        _line("total", size_text(plan["bytes_per_step"])),
    ]


def _time(plan: dict[str, Any]) -> list[str]:
    parts = sorted(plan["step_parts_s"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts if seconds * 1e3 >= 0.05)
    rows = [
        (
            f"{row['gpus']:,} GPUs", f"{row['step_s'] * 1e3:.1f}", f"{row['images_per_s']:,.0f}",
            f"{row['dominant']} ({row['dominant_share']:.0%})",
        )
        for row in plan["scaling"]
    ]  # fmt: skip
    return [
        f"expected time on {plan['gpu']} (a model, not a measurement)",
        _line("step", f"{plan['step_s'] * 1e3:.1f} ms, {plan['images_per_s']:,.0f} images/s, MFU {plan['mfu']:.0%}"),
        _line("parts, ms", shown),
        *_rows([("", "ms", "images/s", "largest part"), *rows], (14, 10, 12)),
    ]


def _advice(plan: dict[str, Any]) -> list[str]:
    rows = [
        (f"ep {c['ep_size']}", f"{c['step_s'] * 1e3:.1f}", f"{c['memory_gb']:.1f}", "" if c["fits"] else "does not fit")
        for c in plan["ep_choices"]
    ]
    return [
        _line("best ep", f"{plan['ep_best']}: {plan['ep_reason']}"),
        *_rows([("", "ms", "GB", ""), *rows], (14, 10, 12)),
    ]


def _simulation(plan: dict[str, Any]) -> list[str]:
    found = plan["simulation"]
    counted = [
        f"{kind}: {calls['calls']} calls, {size_text(calls['bytes'])}" for kind, calls in found["collectives"].items()
    ]
    lines = [
        f"simulation of rank 0 of {plan['world']:,}: forward and backward pass, {found['seconds']:.1f} s",
        _line("activations", f"{found['activations_gb']:.2f} GB; peak {found['backward_peak_gb']:.2f} GB"),
        _line("collectives", "; ".join(counted) or "none"),
    ]
    if found["assumed_even"]:
        lines.append(_line("assumed", f"even routing where sizes depend on data ({', '.join(found['assumed_even'])})"))
    return lines
