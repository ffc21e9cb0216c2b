"""DeepSpeed's settings that this project does not support: when they are switched off, and what to use instead."""

from __future__ import annotations

from typing import Any

PAGE = "docs/deepspeed.md"
"""Says which of DeepSpeed's features are supported, and why others are not."""
SAVED_OTHERWISE = "checkpoints have a format of their own; see the checkpoint section of the recipe"
FEWER_GATHERS = "parameters are partitioned by stage 3 alone"
UNSUPPORTED: dict[str, dict[str, str]] = {
    "": {
        "activation_checkpointing": "set model.activation_checkpointing in the recipe",
        "amp": "use bf16",
        "autotuning": "`diffmoe plan` computes memory and traffic of a layout",
        "comet": "use tensorboard, wandb or csv_monitor",
        "compile": "set model.compile in the recipe",
        "compression_training": "weights are neither quantized nor pruned",
        "curriculum_learning": "the order of the images depends on run.seed alone",
        "data_efficiency": "the order of the images depends on run.seed alone",
        "data_types": "gradients are accumulated in the precision of the weights",
        "disable_allgather": "",
        "eigenvalue": "",
        "elasticity": "a run can be resumed on any number of ranks",
        "fp32_allreduce": 'use "communication_data_type": "fp32"',
        "gradient_allreduce_op": "gradients are averaged",
        "gradient_predivide_factor": 'use "communication_data_type": "fp32"',
        "graph_harvesting": "",
        "hybrid_engine": "",
        "managed_gradient_accumulation": "set gradient_accumulation_steps",
        "nebula": "checkpoints are written in the background; see the checkpoint section of the recipe",
        "pipeline": "use expert_parallel, and ZeRO 3 for models that do not fit",
        "prescale_gradients": 'use "communication_data_type": "fp32"',
        "progressive_layer_drop": "",
        "seq_parallel_communication_data_type": "sequences are not split; see communication_data_type",
        "quantize_training": "weights are neither quantized nor pruned",
        "sequence_parallel_size": "sequences are not split; use activation checkpointing for long ones",
        "sparse_attention": "attention is dense",
        "sparse_gradients": "gradients are dense",
        "tensor_parallel": "use expert_parallel",
        "torch_autocast": "use bf16",
        "use_data_before_expert_parallelism": "",
        "weight_quantization": "weights are neither quantized nor pruned",
    },
    "optimizer": {"legacy_fusion": ""},
    "optimizer.params": {
        "adam_w_mode": "weight decay is always decoupled from the gradient, as in AdamW",
        "amsgrad": "",
        "bias_correction": "the moments are always corrected",
        "fp32_optimizer_states": "the moments are always fp32",
        "max_grad_norm": "use gradient_clipping",
        "set_grad_none": "",
    },
    "zero_optimization": {
        "offload_param": f"only the optimizer can be offloaded: offload_optimizer (see {PAGE})",
        "compute_grad_norm": "the norm is in the run's log",
        "cpu_offload": "use offload_optimizer",
        "cpu_offload_param": "only the optimizer can be offloaded: offload_optimizer",
        "cpu_offload_use_pin_memory": "use offload_optimizer.pin_memory",
        "elastic_checkpoint": "a run can be resumed on any number of ranks",
        "enable_sanity_checks": "",
        "leaf_module": "",
        "legacy_stage1": "use stage 1",
        "log_trace_cache_warnings": "",
        "memory_efficient_linear": "",
        "mics_hierarchical_params_gather": FEWER_GATHERS,
        "mics_shard_size": FEWER_GATHERS,
        "override_module_apply": "",
        "parameter_alignment": "",
        "pipeline_loading_checkpoint": SAVED_OTHERWISE,
        "save_muon_momentum_buffer_in_memory": "use AdamW",
        "stage3_allgather_sequential": "",
        "stage3_module_granularity_threshold": "",
        "stage3_use_all_reduce_for_fetch_params": "",
        "zenflow": "use offload_optimizer",
        "zero_hpz_partition_size": FEWER_GATHERS,
        "zero_quantized_gradients": 'use "communication_data_type": "bf16"',
        "zero_quantized_nontrainable_weights": "all weights are trained",
        "zero_quantized_weights": "weights are gathered in bf16 or fp32",
        "zeropp_loco_param": "",
    },
    "zero_optimization.offload_optimizer": {
        "cpuadam_cores_perc": "set OMP_NUM_THREADS",
        "ratio": "all of the optimizer is offloaded",
        "super_offload": "",
    },
    "bf16": {
        "immediate_grad_update": "",
        "bf16_master_weights_and_grads": "master weights are always fp32",
        "bf16_optimizer_states": "the moments are always fp32",
    },
}
"""By section: each key, and what to use instead, if there is anything."""
IGNORED: dict[str, tuple[str, ...]] = {
    "": (
        "aio", "checkpoint", "dataloader_drop_last", "disable_python_gc", "vocabulary_size",
        "zero_allow_untested_optimizer",
    ),
    "zero_optimization": (
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "load_from_fp32_weights", "ignore_unused_parameters",
    ),
    "zero_optimization.offload_optimizer": ("nvme_path", "pipeline_read", "pipeline_write"),
    "bf16": ("check_grad_overflow",),
    "fp16": (
        "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads", "hysteresis", "initial_scale_power",
        "loss_scale", "loss_scale_window", "min_loss_scale",
    ),
}  # fmt: skip
"""By section: keys without effect here.

They set details of what is off, concern DeepSpeed's own checkpoints and data loader, or are always so.
"""
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "gradient_predivide_factor": (1,),
    "managed_gradient_accumulation": (True,),
    "seq_parallel_communication_data_type": ("fp32",),
    "sequence_parallel_size": (1,),
    "zero_hpz_partition_size": (1,),
    "mics_shard_size": (-1,),
    "autotp_size": (1,),
    "ratio": (1,),
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "fp32_optimizer_states": (True,),
    "set_grad_none": (True,),
    "compute_grad_norm": (True,),
    "memory_efficient_linear": (True,),
    "override_module_apply": (True,),
    "stage3_module_granularity_threshold": (0,),
}
"""Further values that change nothing."""


def is_known(section: str, key: str) -> bool:
    """Return whether a key is one of DeepSpeed's that this project does not pass on."""
    return key in UNSUPPORTED.get(section, ()) or key in IGNORED.get(section, ())


def is_off(key: str, value: Any) -> bool:
    """Return whether a setting changes nothing.

    That is false, null, "none", "auto", a default, or an object that is disabled or contains only such values.

    Args:
        key: its name without that of the section.
        value: its value.
    """
    if isinstance(value, dict):
        switch = next((value[name] for name in ("enabled", "device") if name in value), None)
        is_switched_off = switch is not None and is_off("", switch)
        return is_switched_off or all(is_off(name, item) for name, item in value.items())
    return value is None or value is False or value in ("none", "auto", *DEFAULTS.get(key, ()))


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
