"""The keys of DeepSpeed's JSON that this project passes on or reads itself, and the valid values of each.

DeepSpeed accepts misspelled keys silently and rejects many invalid values with a traceback, some only after minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from diffmoe_ds.config.deepspeed_unsupported import PAGE, is_known, refusal
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.errors import ConfigError

AUTO = "auto"


class Value(NamedTuple):
    """The valid values of a key."""

    expected: str
    """Completes "must be ..." in errors."""
    fits: Callable[[Any], bool]
    """Whether a value is valid."""
    schema: dict[str, Any]
    """The same as JSON schema."""
    auto: bool = True
    """Whether ``"auto"`` is valid, too; `diffmoe_ds.config.deepspeed` resolves it."""
    refused: tuple[tuple[Any, str], ...] = ()
    """Values that DeepSpeed has and this project refuses, each with the reason and what to use instead."""

    @property
    def in_words(self) -> str:
        """All valid values, to complete "must be ..."."""
        if not self.auto:
            return self.expected
        listed = "enum" in self.schema or self.schema["type"] == "boolean"
        return f'{self.expected.replace(" or ", ", ") if listed else self.expected} or "{AUTO}"'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_number(value) and 1 <= value < LARGEST and value == int(value)  # sizes are often written as 5e8


def _is_non_negative(value: Any) -> bool:
    return _is_number(value) and 0 <= value < LARGEST


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)


def _one_of(*values: str, auto: bool = True, refused: tuple[tuple[Any, str], ...] = ()) -> Value:
    words = f"{', '.join(values[:-1])} or {values[-1]}"
    return Value(words, lambda value: value in values, {"enum": list(values)}, auto, refused)


def _always(value: bool, why: str) -> Value:
    schema = {"type": "boolean", "const": value}
    return Value(str(value).lower(), lambda found: found is value, schema, refused=((not value, why),))


LARGEST = 3e38
"""Approximately the largest float32."""
BETA = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}

FLAG = Value("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
TEXT = Value("a string", lambda value: isinstance(value, str), {"type": "string"})
SIZE = Value("a positive integer", _is_size, {"type": "integer", "minimum": 1, "exclusiveMaximum": LARGEST})
BATCH = Value(
    "a positive integer below 2^31", lambda value: _is_int(value) and 0 < value < 2**31,
    {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**31},
)  # fmt: skip
SECTION = Value("an object", lambda value: isinstance(value, dict), {"type": "object"}, auto=False)
NON_NEGATIVE = Value(
    "a non-negative number", _is_non_negative, {"type": "number", "minimum": 0, "exclusiveMaximum": LARGEST}
)
BETAS = Value(
    "a list of two numbers in [0, 1)", _are_betas,
    {"type": "array", "items": BETA, "minItems": 2, "maxItems": 2},
)  # fmt: skip
STAGE = Value(
    "0, 1, 2 or 3", lambda value: _is_int(value) and 0 <= value <= 3,
    {"type": "integer", "minimum": 0, "maximum": 3}, auto=False,
)  # fmt: skip

MOMENTS = {"Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq"), "Lion": ("exp_avg",)}
"""The supported optimizers, and what DeepSpeed and checkpoints call the moments of each."""
OTHER_OPTIMIZERS = tuple(
    (name, f"checkpoints cannot hold the state of other optimizers (see {PAGE})")
    for name in (
        "Adagrad", "Lamb", "Muon", "MuAdam", "MuAdamW", "MuSGD", "OneBitAdam", "OneBitLamb", "SGD", "ZeroOneAdam",
    )
)  # fmt: skip
OFFLOAD = {
    "device": _one_of("none", "cpu", refused=(("nvme", f"NVMe offload is not supported (see {PAGE}); use cpu"),)),
    "pin_memory": FLAG, "buffer_count": SIZE, "fast_init": FLAG,
}  # fmt: skip
ZERO = {
    "stage": STAGE, "contiguous_gradients": FLAG,
    "reduce_scatter": _always(True, "otherwise DeepSpeed sums the gradients of different experts"),
    "reduce_bucket_size": SIZE,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG, "allgather_bucket_size": SIZE, "overlap_comm": FLAG, "offload_optimizer": OFFLOAD,
    "sub_group_size": SIZE, "round_robin_gradients": FLAG, "stage3_prefetch_bucket_size": NON_NEGATIVE,
    "stage3_param_persistence_threshold": NON_NEGATIVE, "stage3_model_persistence_threshold": NON_NEGATIVE,
    "stage3_max_live_parameters": NON_NEGATIVE, "stage3_max_reuse_distance": NON_NEGATIVE,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": BATCH,
    "optimizer": {
        "type": _one_of(*MOMENTS, refused=OTHER_OPTIMIZERS),
        "params": {
            "lr": NON_NEGATIVE, "betas": BETAS, "eps": NON_NEGATIVE, "weight_decay": NON_NEGATIVE, "torch_adam": FLAG,
            "foreach": FLAG, "fused": FLAG,
        },
    },
    "scheduler": {"type": TEXT, "params": SECTION},
    "gradient_clipping": NON_NEGATIVE,
    "bf16": {"enabled": FLAG},
    "fp16": {"enabled": _always(False, f"fp16 is not supported (see {PAGE}); use bf16, or neither for fp32")},
    "zero_optimization": ZERO,
    "expert_parallel": {"autoep_size": Value("an integer", _is_int, {"type": "integer"}), "enabled": FLAG},
    "tensorboard": {"enabled": FLAG, "output_path": TEXT, "job_name": TEXT},
    "wandb": {"enabled": FLAG, "group": TEXT, "team": TEXT, "project": TEXT},
    "csv_monitor": {"enabled": FLAG, "output_path": TEXT, "job_name": TEXT},
    "steps_per_print": SIZE, "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "communication_data_type": _one_of("fp32", "fp16", "bf16"),
    "zero_force_ds_cpu_optimizer": FLAG, "comms_logger": SECTION, "flops_profiler": SECTION,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
}  # fmt: skip
WARMUP = {"warmup_num_steps": False, "warmup_type": False, "last_batch_iteration": False}
SCHEDULES: dict[str, dict[str, bool]] = {
    "LRRangeTest": dict.fromkeys(
        (
            "lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate", "lr_range_test_staircase",
            "last_batch_iteration",
        ),
        False,
    ),
    "OneCycle": {
        "cycle_min_lr": True, "cycle_max_lr": True,
        **dict.fromkeys(
            (
                "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size", "cycle_first_stair_count",
                "cycle_second_stair_count", "decay_step_size", "cycle_momentum", "cycle_min_mom", "cycle_max_mom",
                "decay_mom_rate", "last_batch_iteration",
            ),
            False,
        ),
    },
    "WarmupLR": {"warmup_min_lr": False, "warmup_max_lr": False, **WARMUP},
    "WarmupDecayLR": {"total_num_steps": True, "warmup_min_lr": False, "warmup_max_lr": False, **WARMUP},
    "WarmupCosineLR": {"total_num_steps": True, "warmup_min_ratio": False, "cos_min_ratio": False, **WARMUP},
}  # fmt: skip
"""DeepSpeed's schedules: each parameter, and whether it is required. A contract test compares this with DeepSpeed."""


MAX_PROBLEMS = 50
"""Invalid keys that an error names; finding the nearest valid ones for a hostile file's would take seconds."""


def check_keys(tree: dict[str, Any], source: str) -> None:
    """Check the whole JSON against `KEYS`.

    Args:
        tree: the JSON's content.
        source: the file's name, for errors.

    Raises:
        ConfigError: unknown keys, each with the nearest valid one; invalid values, each with the valid ones; settings
            of DeepSpeed that are not supported, each with what to use instead. Up to `MAX_PROBLEMS` at once.
    """
    every = chain(_problems(tree, KEYS, ""), _schedule_problems(tree.get("scheduler")))
    problems = list(islice(every, MAX_PROBLEMS + 1))
    if len(problems) == 1:
        raise ConfigError(f"{source}: {problems[0]}")
    if problems:
        count = len(problems) if len(problems) <= MAX_PROBLEMS else f"more than {MAX_PROBLEMS}"
        raise ConfigError("\n  ".join([f"{source}: {count} keys are invalid:", *problems[:MAX_PROBLEMS]]))


def _problems(tree: dict[str, Any], keys: dict[str, Any], section: str) -> Iterator[str]:
    """Yield a sentence for each problem of a section and those inside it."""
    is_listed = False
    for key, value in tree.items():
        name = f"{section}.{key}" if section else key
        rule = keys.get(key)
        if is_known(section, key):
            problem = refusal(section, key, value)
            if problem is not None:
                yield problem
        elif rule is None:
            yield unknown(section or "top-level key", key, keys, lists_valid=not is_listed)
            is_listed = True
        elif isinstance(rule, dict):
            if isinstance(value, dict):
                yield from _problems(value, rule, name)
            else:
                yield f"{name} must be an object, got {short_repr(value)}."
        elif not (rule.fits(value) or (rule.auto and value == AUTO)):
            why = next((f"; {why}" for refused, why in rule.refused if value == refused), "")
            yield f"{name} must be {rule.in_words}, got {short_repr(value)}{why}."


def _schedule_problems(section: Any) -> Iterator[str]:
    """Yield a sentence for each problem of the scheduler section that depends on its type."""
    if not isinstance(section, dict) or not isinstance(section.get("type", ""), str):
        return  # absent, or reported already
    kind, params = section.get("type"), section.get("params", {})
    if kind in (None, AUTO):
        found = "nothing" if kind is None else repr(kind)
        yield f"scheduler.type must be one of {', '.join(SCHEDULES)}, got {found}."
    elif kind not in SCHEDULES:
        yield unknown("scheduler.type", kind, SCHEDULES)
    elif isinstance(params, dict):
        valid = SCHEDULES[kind]
        yield from (unknown("scheduler.params", key, valid) for key in params if key not in valid)
