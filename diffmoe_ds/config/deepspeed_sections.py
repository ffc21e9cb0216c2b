"""Sections of the DeepSpeed JSON: the checks beyond `check_keys`, and the values of ``"auto"``.

The functions fill `Resolution.tree` in place and append a note for each value that they resolve or change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffmoe_ds.config.deepspeed_keys import AUTO, SCHEDULES
from diffmoe_ds.config.deepspeed_unsupported import drop_unsupported
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.topology import Topology, largest_ep_size

STEPS_PER_PRINT = 10**9
"""Default interval of DeepSpeed's progress line: practically never, because the training loop prints its own."""
FP32_REDUCTION_RANKS = 64
"""World size from which bf16 gradients are summed in fp32: see "Reducing gradients" in ``docs/training.md``."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Resolution:
    """A DeepSpeed configuration that is being resolved, and the inputs that determine it."""

    tree: dict[str, Any]
    """The JSON's content; modified in place."""
    config: Config
    """The recipe."""
    source: str
    """The file's name, for errors."""
    world: int
    """Number of ranks W."""
    local_world: int
    """Ranks on this host."""
    device: str
    """Device type: ``cpu``, ``cuda``, ..."""
    is_prebuilt: Callable[[str], bool]
    """Whether an operator of DeepSpeed, such as ``fused_adam``, was compiled when DeepSpeed was installed."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each value that was resolved or changed."""

    @property
    def offloads_optimizer(self) -> bool:
        """Whether Adam runs on the CPU."""
        return bool(self.tree["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu")

    def error(self, message: str) -> ConfigError:
        """Return an error that names this file."""
        return ConfigError(f"{self.source}: {message}")

    def fill(self, section: dict[str, Any], key: str, value: Any, where: str = "") -> None:
        """Replace ``"auto"`` with a value and note it."""
        if section.get(key) == AUTO:
            section[key] = value
            self.notes.append(f"{where}{key}: auto is {json.dumps(value)}")


def drop_switched_off(job: Resolution) -> None:
    """Remove settings that are not passed on, because they are switched off or without effect."""
    dropped = drop_unsupported(job.tree)
    if dropped:
        job.notes.append(f"without effect here, and dropped: {', '.join(dropped)}")


def resolve_batch(job: Resolution) -> tuple[int, int, int]:
    """Solve train_batch_size = micro-batch x accumulation x W, with up to two of the three unknown.

    Returns:
        Images per optimizer step, images per forward pass of a rank, and forward passes per optimizer step.

    Raises:
        ConfigError: too few values are given, or they are inconsistent.
    """
    given = [job.tree.get(name, AUTO) for name in BATCH_KEYS]
    total: Any
    micro: Any
    accumulation: Any
    total, micro, accumulation = (None if value == AUTO else value for value in given)
    if total is None and micro is None:
        raise job.error(f'{BATCH_KEYS[0]} or {BATCH_KEYS[1]} must be a number; the other one can be "auto".')
    least = micro or 1
    if accumulation is None:
        accumulation = 1
        if total and micro and total % (micro * job.world) == 0:
            accumulation = total // (micro * job.world)
    if total is None:
        assert micro is not None, "one of the two is given"
        total = micro * accumulation * job.world
    if micro is None:
        micro = total // (accumulation * job.world)
    product = micro * accumulation * job.world
    if micro < 1 or product != total:
        raise job.error(
            f"train_batch_size must equal train_micro_batch_size_per_gpu ({micro}) x gradient_accumulation_steps "
            f"({accumulation}) x ranks ({job.world}) = {product}, got {total}; multiples of "
            f"{least * accumulation * job.world} are valid."
        )
    for name, value, found in zip(BATCH_KEYS, given, (total, micro, accumulation), strict=True):
        if value == AUTO and name in job.tree:
            job.notes.append(f"{name}: auto is {found}")
    return total, micro, accumulation


def check_zero(job: Resolution) -> int:
    """Return the ZeRO stage.

    Raises:
        ConfigError: with these settings, DeepSpeed would train experts incorrectly or not at all.
    """
    zero = job.tree.setdefault("zero_optimization", {"stage": 0})
    stage: int = zero.setdefault("stage", 0)
    if stage == 2 and zero.get("contiguous_gradients", True) not in (True, AUTO):
        raise job.error(
            "zero_optimization.contiguous_gradients must be true at stage 2, got false; DeepSpeed requires it for "
            "experts."
        )
    if job.offloads_optimizer and stage == 0:
        raise job.error('zero_optimization.offload_optimizer.device must be "none" at stage 0, got "cpu".')
    return stage


def resolve_precision(job: Resolution) -> bool:
    """Return whether training uses bf16; without it, fp32."""
    job.fill(job.tree.pop("fp16", {}), "enabled", False, "fp16.")
    bf16 = job.tree.get("bf16", {}).get("enabled", False)
    if bf16 == AUTO:
        bf16 = job.device != "cpu"
        job.notes.append(f"bf16.enabled: auto is {str(bf16).lower()} on {job.device}")
    # Otherwise DeepSpeed applies non-finite bf16 gradients; in fp32 it always discards them.
    job.tree["bf16"] = {"enabled": bf16, "check_grad_overflow": True}
    return bool(bf16)


def resolve_reduction(job: Resolution, bf16: bool) -> None:
    """Choose the dtype in which gradients are summed over ranks: DeepSpeed's, unless bf16 loses too much."""
    key, many = "communication_data_type", bf16 and job.world >= FP32_REDUCTION_RANKS
    if many and key not in job.tree:
        job.notes.append(f"{key}: fp32, because sums of bf16 gradients over {job.world} ranks are inaccurate")
        job.tree[key] = "fp32"
    job.fill(job.tree, key, "bf16" if bf16 and not many else "fp32")


def _schedule_of_recipe(job: Resolution, steps: int, global_batch: int) -> None:
    """Add the scheduler of ``optimizer.warmup_images`` and ``optimizer.schedule``, unless the JSON has one.

    Args:
        job: the configuration, with a resolved optimizer.
        steps: optimizer steps of the run.
        global_batch: images per optimizer step.
    """
    ours, lr = job.config.optimizer, job.tree["optimizer"]["params"]["lr"]
    if ours.warmup_images == 0 and ours.schedule == "constant":
        return
    if "scheduler" in job.tree:
        job.notes.append(f"scheduler is that of {job.source}, not the recipe's")
        return
    warmup = {"warmup_num_steps": max(1, -(-ours.warmup_images // global_batch)), "warmup_type": "linear"}
    if ours.schedule == "cosine":
        section = {"type": "WarmupCosineLR", "params": {"total_num_steps": steps, **warmup, "cos_min_ratio": 0.0}}
    else:
        section = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": lr, **warmup}}
    job.tree["scheduler"] = section
    job.notes.append(f"scheduler: {section['type']} with {json.dumps(section['params'])}, from the recipe")


def resolve_scheduler(job: Resolution, global_batch: int) -> None:
    """Add the recipe's learning-rate schedule, and check the schedule, if there is one.

    Args:
        job: the configuration, with a resolved optimizer.
        global_batch: images per optimizer step.

    Raises:
        ConfigError: a required parameter without a value.
    """
    steps = -(-job.config.run.total_images // global_batch)
    _schedule_of_recipe(job, steps, global_batch)
    section = job.tree.get("scheduler")
    if section is None:
        return
    kind, params = section["type"], section.get("params", {})
    known = {"warmup_max_lr": job.tree["optimizer"]["params"]["lr"], "total_num_steps": steps}
    for key, value in known.items():
        job.fill(params, key, value, "scheduler.params.")
    for key, required in SCHEDULES[kind].items():
        if required and params.get(key, AUTO) == AUTO:
            raise job.error(
                f"scheduler.params.{key} must be given for {kind}: neither the recipe nor DeepSpeed has a value for it."
            )


def resolve_expert_parallel(job: Resolution) -> int:
    """Return the expert-parallel size P.

    Raises:
        ConfigError: the recipe sets a different size.
        TopologyError: P does not divide the experts and the ranks.
    """
    section = job.tree.setdefault("expert_parallel", {})
    experts = job.config.num_experts
    if section.pop("enabled", None):
        # DeepSpeed would look for a Hugging Face model whose experts it could replace.
        job.notes.append("expert_parallel.enabled is dropped, because the model has its own expert-parallel layers")
    ep_size: Any = section.get("autoep_size", 1 if experts == 1 else AUTO)
    if ep_size == AUTO:
        ep_size = largest_ep_size(experts, job.world, job.local_world)
        job.notes.append(f"expert_parallel.autoep_size: auto is {ep_size}")
    repeated = job.config.expert_parallel.autoep_size
    if repeated is not None and repeated != ep_size:
        raise ConfigError(
            f"expert_parallel.autoep_size is {repeated} in the recipe or --set, but {ep_size} in {job.source}; set it "
            "only there."
        )
    Topology(rank=0, world=job.world, ep_size=ep_size, num_experts=experts)
    job.tree["expert_parallel"] = {"autoep_size": ep_size}
    return int(ep_size)


def resolve_clipping(job: Resolution) -> float:
    """Return the maximum norm of the gradient; 0, not DeepSpeed's 1.0, if the JSON sets none."""
    job.fill(job.tree, "gradient_clipping", 0.0)
    return float(job.tree.get("gradient_clipping", 0.0))


def resolve_reports(job: Resolution) -> None:
    """Switch DeepSpeed's progress line and throughput timer off unless the JSON sets them.

    The timer synchronizes the device twice per step to measure a throughput that the run's log contains anyway.
    """
    job.fill(job.tree, "steps_per_print", STEPS_PER_PRINT)
    job.tree.setdefault("steps_per_print", STEPS_PER_PRINT)
    throughput = job.tree.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    job.fill(throughput, "enabled", False, "timers.throughput.")


def _resolve_tensorboard(job: Resolution) -> tuple[bool, str | None]:
    """Remove the section, as DeepSpeed would write a second set of files, and return its settings.

    Returns:
        Whether to write TensorBoard files, and the directory if the JSON names one.
    """
    section = job.tree.pop("tensorboard", {"enabled": True})
    for key, default in (("enabled", True), ("output_path", ""), ("job_name", "")):
        job.fill(section, key, default, "tensorboard.")
    path = section.get("output_path")
    directory = str(Path(path) / section.get("job_name", "")) if path else None
    return section.get("enabled", False), directory


def resolve_monitors(job: Resolution) -> tuple[bool, str | None]:
    """Check the sections of DeepSpeed's monitors, which receive this project's scalars.

    Returns:
        Whether to write TensorBoard files, and the directory if the JSON names one.

    Raises:
        ConfigError: Weights & Biases is enabled, but not installed.
    """
    for name in ("wandb", "csv_monitor"):
        section = job.tree.get(name, {})
        job.fill(section, "enabled", False, f"{name}.")
        if not section.get("enabled", False):
            job.tree.pop(name, None)
    if "wandb" in job.tree:
        if find_spec("wandb") is None:
            raise job.error("wandb.enabled needs wandb, which is not installed: pip install 'diffmoe_ds[wandb]'.")
        job.tree["wandb"].setdefault("project", "diffmoe")
    return _resolve_tensorboard(job)


def drop_autos(job: Resolution, section: dict[str, Any] | None = None, where: str = "") -> None:
    """Remove each remaining ``"auto"``, so that DeepSpeed uses its default."""
    section = job.tree if section is None else section
    for key, value in list(section.items()):
        if isinstance(value, dict):
            drop_autos(job, value, f"{where}{key}.")
        elif value == AUTO:
            del section[key]
            job.notes.append(f"{where}{key}: auto is DeepSpeed's default")
