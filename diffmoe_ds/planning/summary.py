"""Everything that ``diffmoe plan`` reports, as plain data; `planning/table.py` prints it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from diffmoe_ds.planning.advice import best_choice, ep_choices, scaling
from diffmoe_ds.planning.cost import StepTime, step_time
from diffmoe_ds.planning.devices import DEVICES, Device
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.planning.memory import StepMemory, fits_in, step_memory
from diffmoe_ds.planning.messages import Message, messages_of_passes, step_messages
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.planning.resume import ResumeCost, resume_cost
from diffmoe_ds.planning.simulate import Passes, Simulation, estimate_passes, simulate

GB = 1e9


def plan_summary(layout: Layout, device: Device, simulated: bool, assumed: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a layout.

    Args:
        layout: the model and its ranks.
        device: the GPU of the verdict and of the times.
        simulated: also run rank 0 of the whole model on fake tensors, and use its counts.
        assumed: the values of the layout's configuration that depend on a training set, by key.

    Returns:
        Numbers, strings, lists and dicts; sizes in bytes, except for names that end in ``_gb`` (10^9 bytes).
    """
    is_on = layout.config.model.activation_checkpointing
    passes = {on: estimate_passes(layout.with_checkpointing(on)) for on in (False, True)}
    report = _simulate(layout) if simulated else None
    if report is not None:
        passes[is_on] = report[1]
    memory = step_memory(layout, passes[is_on])
    messages = step_messages(layout)
    return {
        **_model(layout),
        "assumed": assumed,
        **_memory(layout, memory, passes),
        **_resume(resume_cost(layout)),
        "bytes_per_step": sum(message.bytes for message in messages),
        "collectives": [_message(message) for message in messages],
        **_verdict(memory, device),
        **_time(layout, device, passes[is_on]),
        **({} if report is None else {"simulation": report[0]}),
        "notes": list(layout.settings.notes),
    }


def _message(message: Message) -> dict[str, Any]:
    """Return a message with the bytes that a rank passes in and gets back, besides those that are counted."""
    gathers, scatters = message.collective == "all_gather", message.collective == "reduce_scatter"
    return {
        **asdict(message),
        "bytes_in": message.bytes // (message.ranks if gathers else 1),
        "bytes_out": message.bytes // (message.ranks if scatters else 1),
    }


def _model(layout: Layout) -> dict[str, Any]:
    config, settings = layout.config, layout.settings
    counts, flops = count_parameters(config), flops_per_image(config)
    return {
        "model": config.model_name,
        "routing": config.routing.kind,
        "pool": config.routing.pool,
        "text_encoders": [list(shape) for shape in config.model.text_encoders],
        "world": layout.world,
        "gpus_per_node": layout.local_world,
        "ep_size": settings.ep_size,
        "zero_stage": settings.zero_stage,
        "dtype": "bf16" if settings.bf16 else "fp32",
        "micro_batch": settings.micro_batch,
        "accumulation": settings.accumulation,
        "global_batch": settings.global_batch,
        "activation_checkpointing": config.model.activation_checkpointing,
        "params_total": counts.total,
        "params_activated": counts.activated,
        "params_touched": counts.touched,
        "params_ffn": counts.ffn,
        "params_experts": counts.experts,
        "params_routers": counts.routers,
        "params_per_rank": layout.elements(False) + layout.elements(True),
        "flops_per_image": round(flops.forward),
        "flops_per_image_training": round(flops.training),
    }


def _memory(layout: Layout, memory: StepMemory, passes: dict[bool, Passes]) -> dict[str, Any]:
    phase = memory.phase
    return {
        "memory_per_rank_gb": memory.total / GB,
        "memory_parts_gb": {name: size / GB for name, size in memory.parts.items()},
        "memory_peak_phase": phase.name,
        "memory_phases_gb": {p.name: (memory.total - phase.total + p.total) / GB for p in _highest(memory)},
        "activations_gb": passes[False].saved / GB,
        "activations_checkpointing_gb": passes[True].saved / GB,
        "dispatch_buffers_gb": memory.dispatch / GB,
        "host_checkpoint_gb": memory.host_checkpoint / GB,
        "host_optimizer_gb": memory.host_optimizer / GB,
    }


def _resume(cost: ResumeCost) -> dict[str, Any]:
    return {
        "resume_opens": cost.opens,
        "resume_read_gb": cost.read / GB,
        "resume_exchanged_gb": cost.exchanged / GB,
        "resume_host_gb": cost.host_memory / GB,
    }


def _highest(memory: StepMemory) -> list[Any]:
    """Return one phase of each name, the one with the highest peak."""
    by_name = {phase.name: phase for phase in sorted(memory.phases, key=lambda phase: phase.total)}
    return [by_name[name] for name in dict.fromkeys(phase.name for phase in memory.phases)]


def _verdict(memory: StepMemory, device: Device) -> dict[str, Any]:
    return {
        "gpu": device.name,
        "fits": fits_in(device.memory_bytes, memory.total),
        "gpus": {
            name: {
                "fits": fits_in(other.memory_bytes, memory.total),
                "memory_gb": other.memory_bytes / GB,
                "free_gb": (other.memory_bytes - memory.total) / GB,
            }
            for name, other in DEVICES.items()
        },
    }


def _time(layout: Layout, device: Device, passes: Passes) -> dict[str, Any]:
    seconds = step_time(layout, device, passes.operators)
    choices = ep_choices(layout, device, passes)
    best, reason = best_choice(choices, layout.local_world)
    images = layout.settings.global_batch
    peak = device.bf16_flops * layout.world
    return {
        "step_s": seconds.total,
        "step_parts_s": seconds.parts,
        "step_dominant": seconds.dominant,
        "images_per_s": images / seconds.total,
        "mfu": images * flops_per_image(layout.config).training / seconds.total / peak,
        "scaling": [
            {"gpus": gpus, **_scaled(layout, gpus, found)}
            for gpus, found in scaling(layout, device, passes.operators).items()
        ],
        "ep_best": best.ep_size,
        "ep_reason": reason,
        "ep_choices": [
            {"ep_size": c.ep_size, "step_s": c.seconds.total, "memory_gb": c.memory / GB, "fits": c.fits}
            for c in choices
        ],
    }


def _scaled(layout: Layout, gpus: int, seconds: StepTime) -> dict[str, Any]:
    images = layout.settings.micro_batch * layout.settings.accumulation * gpus
    return {
        "step_s": seconds.total,
        "images_per_s": images / seconds.total,
        "dominant": seconds.dominant,
        "dominant_share": seconds.parts[seconds.dominant] / seconds.total,
    }


def _simulate(layout: Layout) -> tuple[dict[str, Any], Passes]:
    """Simulate rank 0 of the layout; return what was counted, and the bytes of its passes."""
    start = time.perf_counter()
    found = simulate(layout.config, layout.topology, layout.settings.micro_batch, layout.dtype)
    elapsed = time.perf_counter() - start
    passes = Passes(found.saved, max(found.forward_peak, found.backward_peak) - found.saved, found.operators)
    return {
        "seconds": elapsed,
        "activations_gb": found.saved / GB,
        "forward_peak_gb": found.forward_peak / GB,
        "backward_peak_gb": found.backward_peak / GB,
        "operators": found.operators,
        "collectives": _counted(found),
        "planned_bytes": {m.purpose: m.bytes for m in messages_of_passes(layout)},
        "assumed_even": list(found.assumed),
    }, passes


def _counted(found: Simulation) -> dict[str, dict[str, int]]:
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for kind, message in found.messages:
        calls[kind] += 1
        size[kind] += message
    return {kind: {"calls": calls[kind], "bytes": size[kind]} for kind in calls}
