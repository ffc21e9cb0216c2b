"""Which expert-parallel size suits a cluster, and how a layout scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from diffmoe_ds.planning.cost import StepTime, step_time
from diffmoe_ds.planning.devices import Device
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.planning.memory import fits_in, step_memory
from diffmoe_ds.planning.simulate import Passes

SCALES = (8, 64, 1024)
"""Numbers of GPUs for which `scaling` estimates the step."""


@dataclass(frozen=True)
class Choice:
    """One expert-parallel size."""

    ep_size: int
    """P."""
    seconds: StepTime
    """Expected time of a step."""
    memory: int
    """Peak bytes of a rank."""
    fits: bool
    """Whether the GPU has that much."""


def ep_choices(layout: Layout, device: Device, passes: Passes) -> list[Choice]:
    """Return all EP sizes that divide the ranks and the experts, smallest first.

    Args:
        layout: its other values are kept.
        device: the GPU.
        passes: of the layout; activations hardly depend on the EP size.
    """
    sizes = [p for p in range(1, layout.world + 1) if layout.world % p == 0 and layout.config.num_experts % p == 0]
    found = []
    for size in sizes:
        other = with_ranks(layout, layout.world, size)
        memory = step_memory(other, passes).total
        seconds = step_time(other, device, passes.operators)
        found.append(Choice(size, seconds, memory, fits_in(device.memory_bytes, memory)))
    return found


def best_choice(choices: list[Choice], local_world: int) -> tuple[Choice, str]:
    """Return the fastest EP size that fits, or the one that needs the least memory, and the reason in one sentence.

    Args:
        choices: of `ep_choices`.
        local_world: ranks per node.
    """
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        best = min(choices, key=lambda choice: choice.memory)
        return best, f"no size fits; this one needs the least memory, {best.memory / 1e9:.1f} GB"
    best = min(fitting, key=lambda choice: (round(choice.seconds.total, 5), choice.ep_size))
    if len(choices) == 1:
        return best, "the only size that divides the ranks and the experts"
    others = [choice for choice in fitting if choice is not best]
    refused = [choice.ep_size for choice in choices if not choice.fits]
    where = "within a node" if best.ep_size <= local_world else "across nodes"
    reasons = []
    if others:
        second = min(others, key=lambda choice: choice.seconds.total)
        saved = 1 - best.seconds.total / second.seconds.total
        reasons.append(
            f"fastest that fits, {saved:.0%} less time per step than ep {second.ep_size}{_because(best, second)}"
        )
    if best.ep_size > 1:
        reasons.append(f"all-to-all stays {where}" if where == "within a node" else "all-to-all crosses nodes")
    if refused:
        reasons.append(f"ep {', '.join(map(str, refused))} would not fit")
    return best, "; ".join(reasons)


def _because(best: Choice, second: Choice) -> str:
    """Name the part of the step in which the best choice saves most."""
    saved = {name: second.seconds.parts[name] - part for name, part in best.seconds.parts.items()}
    name = max(saved, key=saved.__getitem__)
    return f", mostly {name}" if saved[name] > 0 else ""


def scaling(layout: Layout, device: Device, operators: int) -> dict[int, StepTime]:
    """Return the expected step time at `SCALES` GPUs with the same micro-batch on each.

    Args:
        layout: the model; its EP size is kept where it divides the number of ranks.
        device: the GPU.
        operators: operators of a forward and backward pass.
    """
    return {
        world: step_time(with_ranks(layout, world, math.gcd(layout.settings.ep_size, world)), device, operators)
        for world in SCALES
    }


def with_ranks(layout: Layout, world: int, ep_size: int) -> Layout:
    """Return the layout on other ranks, with the same micro-batch on each of them."""
    settings = layout.settings
    batch = settings.micro_batch * settings.accumulation * world
    return Layout(
        layout.config, replace(settings, ep_size=ep_size, global_batch=batch), world, min(layout.local_world, world)
    )
