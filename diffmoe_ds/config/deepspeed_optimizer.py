"""The optimizer section of the DeepSpeed JSON: its type, whose Adam, which implementation, and the recipe's values."""

from __future__ import annotations

import json
from typing import Any

from diffmoe_ds.config.deepspeed_keys import AUTO
from diffmoe_ds.config.deepspeed_sections import Resolution

ADAM_ONLY = ("eps", "torch_adam", "foreach", "fused")
"""Parameters of Adam that Lion does not have."""
OPERATORS = {"FusedAdam": "fused_adam", "DeepSpeedCPUAdam": "cpu_adam"}
"""DeepSpeed's own Adam on GPUs and, for an offloaded optimizer, on the CPU, with the compiled operator of each."""


def resolve_optimizer(job: Resolution) -> None:
    """Fill in the optimizer; values in the JSON take precedence over the recipe's.

    Raises:
        ConfigError: options that the optimizer does not have or that exclude each other, or Lion where it cannot run.
    """
    optimizer = job.tree.setdefault("optimizer", {})
    job.fill(optimizer, "type", "AdamW", "optimizer.")
    is_lion = optimizer.setdefault("type", "AdamW") == "Lion"
    params = optimizer.setdefault("params", {})
    if is_lion:
        _check_lion(job, params)
    for key in ("lr", "betas", "weight_decay") if is_lion else ("lr", "betas", "eps", "weight_decay"):
        ours = getattr(job.config.optimizer, key)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if params.get(key, AUTO) == AUTO:
            if key in params:
                job.notes.append(f"optimizer.params.{key}: auto is {ours}")
            params[key] = ours
        elif params[key] != ours:
            job.notes.append(f"optimizer.params.{key} is {params[key]} from {job.source}, not the recipe's {ours}")
    if not is_lion:
        _choose_adam(job, params)


def _check_lion(job: Resolution, params: dict[str, Any]) -> None:
    """Check that DeepSpeed has a Lion for this device and stage, and drop Adam's options that are "auto"."""
    for key in ADAM_ONLY:
        if params.pop(key, AUTO) != AUTO:
            raise job.error(f"optimizer.params.{key} is an option of Adam; Lion has lr, betas and weight_decay.")
    if job.tree["zero_optimization"]["stage"] == 0:  # where DeepSpeed's bf16 wrapper begins with a zero-gradient step
        raise job.error('optimizer.type "Lion" needs zero_optimization.stage 1, 2 or 3, got 0.')
    if job.device == "cpu" and not job.offloads_optimizer:
        raise job.error(
            'optimizer.type "Lion" on a CPU needs zero_optimization.offload_optimizer.device "cpu", because '
            "DeepSpeed's other Lion runs on GPUs only; or use AdamW."
        )


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
