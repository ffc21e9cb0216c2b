"""Which keys of DeepSpeed's JSON this project passes on or reads itself, and what each may hold.

DeepSpeed accepts misspelt keys silently and answers many wrong values with a traceback, some of them after minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.errors import ConfigError

AUTO = "auto"


class Value(NamedTuple):
    """What a key may hold."""

    expected: str
    """In words, for errors."""
    fits: Callable[[Any], bool]
    """Whether a value is right."""
    auto: bool = True
    """Whether ``"auto"`` is right too; then `config/deepspeed.py` resolves it."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value < 3e38


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)


FLAG = Value("true or false", lambda value: isinstance(value, bool))
TEXT = Value("text", lambda value: isinstance(value, str))
SIZE = Value("a positive whole number", lambda value: _at_least(1)(value) and value == int(value))  # JSON often has 5e8
BATCH = Value("a positive whole number below 2^31", lambda value: _is_int(value) and 0 < value < 2**31)
SECTION = Value("an object", lambda value: isinstance(value, dict), auto=False)
NOT_NEGATIVE = Value("a number that is not negative", _at_least(0))

OFFLOAD = {
    "device": Value("none or cpu", lambda value: value in ("none", "cpu")),
    "pin_memory": FLAG, "buffer_count": SIZE, "fast_init": FLAG,
}  # fmt: skip
ZERO = {
    "stage": Value("0, 1, 2 or 3", lambda value: _is_int(value) and 0 <= value <= 3, auto=False),
    "contiguous_gradients": FLAG, "reduce_scatter": FLAG, "reduce_bucket_size": SIZE, "allgather_partitions": FLAG,
    "allgather_bucket_size": SIZE, "overlap_comm": FLAG, "offload_optimizer": OFFLOAD, "sub_group_size": SIZE,
    "round_robin_gradients": FLAG, "stage3_prefetch_bucket_size": NOT_NEGATIVE,
    "stage3_param_persistence_threshold": NOT_NEGATIVE, "stage3_model_persistence_threshold": NOT_NEGATIVE,
    "stage3_max_live_parameters": NOT_NEGATIVE, "stage3_max_reuse_distance": NOT_NEGATIVE,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": BATCH,
    "optimizer": {
        "type": TEXT,
        "params": {
            "lr": NOT_NEGATIVE, "betas": Value("a list of two numbers from 0 to below 1", _are_betas),
            "eps": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "torch_adam": FLAG, "foreach": FLAG,
        },
    },
    "scheduler": {"type": TEXT, "params": SECTION},
    "gradient_clipping": NOT_NEGATIVE,
    "bf16": {"enabled": FLAG},
    "fp16": SECTION,
    "zero_optimization": ZERO,
    "expert_parallel": {"autoep_size": Value("a whole number", _is_int), "enabled": FLAG},
    "tensorboard": {"enabled": FLAG, "output_path": TEXT, "job_name": TEXT},
    "steps_per_print": SIZE, "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "communication_data_type": Value("fp32, fp16 or bf16", lambda value: value in ("fp32", "fp16", "bf16")),
    "zero_force_ds_cpu_optimizer": FLAG, "comms_logger": SECTION, "flops_profiler": SECTION,
    "log_level": Value(
        "debug, info, warning, error or critical",
        lambda value: value in ("debug", "info", "warning", "error", "critical"),
    ),
}  # fmt: skip
# DeepSpeed's other keys, by section, so that a user hears "not supported" instead of "unknown".
UNSUPPORTED = {
    "": (
        "activation_checkpointing", "aio", "amp", "autotuning", "checkpoint", "comet", "compile",
        "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types", "elasticity",
        "gradient_predivide_factor", "hybrid_engine", "nebula", "pipeline", "prescale_gradients",
        "sequence_parallel_size", "sparse_attention", "sparse_gradients", "tensor_parallel", "torch_autocast",
        "use_data_before_expert_parallelism", "wandb", "zero_allow_untested_optimizer",
    ),
    "zero_optimization": (
        "offload_param", "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "cpu_offload", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
        "elastic_checkpoint", "load_from_fp32_weights", "ignore_unused_parameters", "mics_shard_size",
    ),
    "zero_optimization.offload_optimizer": ("nvme_path", "ratio", "pipeline_read", "pipeline_write"),
    "bf16": ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
}  # fmt: skip


def check_keys(tree: dict[str, Any], source: str, keys: dict[str, Any] = KEYS, where: str = "") -> None:
    """ConfigError with the nearest valid key, or the valid values, if anything is not as `KEYS` says.

    Args:
        tree: a section of the JSON, or all of it.
        source: the file's name, for errors.
        keys: what the section may hold.
        where: the section's name.
    """
    for key, value in tree.items():
        name = f"{where}.{key}" if where else key
        if key not in keys:
            if key in UNSUPPORTED.get(where, ()):
                raise ConfigError(f"{source}: {name} is a setting of DeepSpeed that this project does not support.")
            raise ConfigError(f"{source}: " + unknown(where or "top-level key", key, keys))
        rule = keys[key]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {name} is {value!r}, but it must be an object.")
            check_keys(value, source, rule, name)
        elif not (rule.fits(value) or (rule.auto and value == AUTO)):
            expected = f'{rule.expected} or "auto"' if rule.auto else rule.expected
            raise ConfigError(f"{source}: {name} is {value!r}, but it must be {expected}.")
