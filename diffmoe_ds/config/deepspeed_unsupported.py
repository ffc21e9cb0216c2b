"""DeepSpeed's settings that this project does not support: when they are switched off, and what to use instead."""

from __future__ import annotations

from typing import Any

UNSUPPORTED: dict[str, dict[str, str]] = {
    "": {
        "activation_checkpointing": "set model.activation_checkpointing in the recipe",
        "aio": "NVMe offload is not supported",
        "amp": "use bf16",
        "autotuning": "`diffmoe plan` computes memory and traffic of a layout",
        "comet": "use tensorboard, wandb or csv_monitor",
        "compile": "set model.compile in the recipe",
        "compression_training": "",
        "curriculum_learning": "",
        "data_efficiency": "",
        "data_types": "gradients are accumulated in the precision of the weights",
        "elasticity": "a run can be resumed on any number of ranks",
        "gradient_predivide_factor": "",
        "hybrid_engine": "",
        "nebula": "checkpoints are written in the background; see the checkpoint section of the recipe",
        "pipeline": "",
        "prescale_gradients": "",
        "sequence_parallel_size": "",
        "sparse_attention": "",
        "sparse_gradients": "",
        "tensor_parallel": "use expert_parallel",
        "torch_autocast": "use bf16",
        "use_data_before_expert_parallelism": "",
    },
    "zero_optimization": {
        "offload_param": "only the optimizer can be offloaded: offload_optimizer",
        "cpu_offload": "use offload_optimizer",
        "zero_hpz_partition_size": "",
        "zero_quantized_weights": "",
        "zero_quantized_gradients": "",
        "elastic_checkpoint": "a run can be resumed on any number of ranks",
        "mics_shard_size": "",
    },
    "zero_optimization.offload_optimizer": {
        "nvme_path": 'NVMe offload is not supported; the device can be "cpu"',
        "ratio": "",
        "pipeline_read": "NVMe offload is not supported",
        "pipeline_write": "NVMe offload is not supported",
    },
    "bf16": {"immediate_grad_update": "", "bf16_master_weights_and_grads": "master weights are always fp32"},
}
"""By section: each key, and what to use instead."""
IGNORED: dict[str, tuple[str, ...]] = {
    "": ("checkpoint", "zero_allow_untested_optimizer"),
    "zero_optimization": (
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "load_from_fp32_weights", "ignore_unused_parameters",
    ),
    "bf16": ("check_grad_overflow",),
}  # fmt: skip
"""By section: keys without effect here, because they concern DeepSpeed's own checkpoints, or are always so."""
DEFAULTS = {
    "gradient_predivide_factor": (1,),
    "sequence_parallel_size": (1,),
    "use_data_before_expert_parallelism": (),
    "zero_hpz_partition_size": (1,),
    "mics_shard_size": (-1,),
    "autotp_size": (1,),
    "ratio": (1,),
}
"""Further values that change nothing."""


def is_known(section: str, key: str) -> bool:
    """Return whether a key is one of DeepSpeed's that this project does not pass on."""
    return key in UNSUPPORTED.get(section, ()) or key in IGNORED.get(section, ())


def is_off(key: str, value: Any) -> bool:
    """Return whether a setting changes nothing: false, null, "none", or an object that is disabled or holds only such.

    Args:
        key: its name without that of the section.
        value: its value.
    """
    if isinstance(value, dict):
        switch = next((value[name] for name in ("enabled", "device") if name in value), None)
        is_switched_off = switch is not None and is_off("", switch)
        return is_switched_off or all(is_off(name, item) for name, item in value.items())
    return value is None or value is False or value == "none" or value in DEFAULTS.get(key, ())


def refusal(section: str, key: str, value: Any) -> str | None:
    """Return a sentence if a known key asks for what is not supported.

    Args:
        section: name of its section; empty for the top level.
        key: see `is_known`.
        value: its value.
    """
    if key in IGNORED.get(section, ()) or is_off(key, value):
        return None
    instead = UNSUPPORTED[section][key]
    name = f"{section}.{key}" if section else key
    return f"{name} is a DeepSpeed setting that this project does not support" + (f"; {instead}." if instead else ".")


def drop_unsupported(tree: dict[str, Any], section: str = "") -> list[str]:
    """Remove the known keys of a checked JSON, which are switched off or without effect, and return their names."""
    dropped = []
    for key, value in list(tree.items()):
        name = f"{section}.{key}" if section else key
        if is_known(section, key):
            del tree[key]
            dropped.append(name)
        elif isinstance(value, dict):
            dropped += drop_unsupported(value, name)
    return dropped
