"""The optimizer section of the DeepSpeed JSON: whose Adam, which implementation, and the recipe's values."""

from __future__ import annotations

import json
from typing import Any

from diffmoe_ds.config.deepspeed_keys import AUTO
from diffmoe_ds.config.deepspeed_sections import Resolution
from diffmoe_ds.config.nearest import unknown

OPTIMIZERS = ("Adam", "AdamW")
OPERATORS = {"FusedAdam": "fused_adam", "DeepSpeedCPUAdam": "cpu_adam"}
"""DeepSpeed's own Adam on GPUs and, for an offloaded optimizer, on the CPU, with the compiled operator of each."""


def resolve_optimizer(job: Resolution) -> None:
    """Fill in the optimizer; values in the JSON take precedence over the recipe's.

    Raises:
        ConfigError: an unknown optimizer.
    """
    optimizer = job.tree.setdefault("optimizer", {})
    job.fill(optimizer, "type", "AdamW", "optimizer.")
    kind = optimizer.setdefault("type", "AdamW")
    if kind not in OPTIMIZERS:
        raise job.error(unknown("optimizer.type", kind, OPTIMIZERS))
    params = optimizer.setdefault("params", {})
    for key in ("lr", "betas", "eps", "weight_decay"):
        ours = getattr(job.config.optimizer, key)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if params.get(key, AUTO) == AUTO:
            if key in params:
                job.notes.append(f"optimizer.params.{key}: auto is {ours}")
            params[key] = ours
        elif params[key] != ours:
            job.notes.append(f"optimizer.params.{key} is {params[key]} from {job.source}, not the recipe's {ours}")
    _choose_adam(job, params)


def _choose_adam(job: Resolution, params: dict[str, Any]) -> None:
    """Choose between the Adam of torch and of DeepSpeed, and torch's implementation.

    DeepSpeed's own needs a compiler at every start unless it is prebuilt, and torch's fused one is as fast.
    """
    name = "DeepSpeedCPUAdam" if job.offloads_optimizer else "FusedAdam"
    torch_only = [key for key in ("fused", "foreach") if params.get(key, AUTO) != AUTO]
    if params.get("torch_adam", AUTO) == AUTO:
        is_prebuilt = job.device != "cpu" and job.is_prebuilt(OPERATORS[name])
        params["torch_adam"] = bool(torch_only) or not is_prebuilt
        why = f"DeepSpeed's {name} is {'' if is_prebuilt else 'not '}prebuilt here"
        if torch_only:
            why = f"optimizer.params.{torch_only[0]} is an option of torch's Adam"
        elif job.device == "cpu":
            why = "DeepSpeed's own Adam needs a compiler on a CPU"
        job.notes.append(f"optimizer.params.torch_adam: {json.dumps(params['torch_adam'])}, because {why}")
    if not params["torch_adam"]:
        if torch_only:
            raise job.error(
                f"optimizer.params.torch_adam must be true with optimizer.params.{torch_only[0]}, an option of torch's "
                "Adam, got false."
            )
        return
    if params.get("fused") is True and params.get("foreach") is True:
        raise job.error("optimizer.params.foreach must be false with optimizer.params.fused, got true.")
    if params.get("fused", AUTO) == AUTO and params.get("foreach", AUTO) == AUTO:
        params["fused"] = True
        job.notes.append("optimizer.params.fused: true, the fastest of torch's implementations of Adam")
