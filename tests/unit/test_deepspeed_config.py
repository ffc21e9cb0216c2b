"""The DeepSpeed JSON: what is accepted, what is refused, and how "auto" resolves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmoe_ds.config.deepspeed import read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import ConfigError, TopologyError

SHIPPED = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))


def resolve(raw: dict, *overrides: str, world: int = 1, local_world: int | None = None, device: str = "cpu"):
    config = load_config("fashion", overrides)
    return resolve_deepspeed(raw, config, "ds.json", world=world, local_world=local_world or world, device=device)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", (1, 2, 4, 32))
def test_shipped_json_resolves_for_many_world_sizes(path, world):
    raw = read_deepspeed_json(path)
    settings = resolve(raw, world=world, local_world=min(world, 8))
    assert settings.micro_batch * settings.accumulation * world == settings.global_batch
    assert settings.ep_size == min(world, 8)
    assert not settings.bf16 and '"auto"' not in json.dumps(settings.json)
    if path.stem != "cpu":
        assert resolve(raw, world=world, local_world=min(world, 8), device="cuda").bf16


@pytest.mark.parametrize(
    ("raw", "message"),
    (
        ({"train_batch_sise": 4}, "'train_batch_sise' is not known; did you mean 'train_batch_size'?"),
        ({"zero_optimization": {"stge": 2}}, "zero_optimization: 'stge' is not known; did you mean 'stage'?"),
        ({"optimizer": {"params": {"learning_rate": 1}}}, "optimizer.params: 'learning_rate' is not known"),
        ({"pipeline": {"stages": 2}}, "pipeline is a DeepSpeed setting that this project does not support; use "),
        ({"comet": {"enabled": True}}, "does not support; use tensorboard, wandb or csv_monitor"),
        ({}, "train_batch_size or train_micro_batch_size_per_gpu must be a number"),
        ({"train_batch_size": 0}, "train_batch_size must be a positive integer"),
        ({"train_batch_size": 6}, "train_batch_size must equal train_micro_batch_size_per_gpu (1) x"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1},
            "train_micro_batch_size_per_gpu (3) x gradient_accumulation_steps (1) x ranks (4) = 12, got 16",
        ),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
        ({"train_batch_size": 16, "zero_optimization": 2}, "zero_optimization must be an object"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 2, "reduce_scatter": False}}, "must be true"),
        ({"train_batch_size": 16, "fp16": {"enabled": True}}, "enabled must be false or \"auto\", got True; fp16 is"),
        ({"train_batch_size": 16, "bf16": {"enabled": "yes"}}, 'true, false or "auto", got'),
        ({"train_batch_size": 16, "optimizer": {"type": "Adan"}}, "type must be Adam, AdamW, Lion or \"auto\""),
        ({"train_batch_size": 16, "optimizer": {"type": "Lamb"}}, "got 'Lamb'; checkpoints cannot hold the state of"),
        ({"train_batch_size": 16, "gradient_clipping": -1}, "gradient_clipping must be a"),
        ({"train_batch_size": 16, "tensorboard": {"enabled": 1}}, "tensorboard.enabled must be true"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "must be true at"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": "auto"}}, "stage must be 0, 1, 2"),
        ({"train_batch_size": 16, "zero_optimization": "auto"}, "zero_optimization must be an"),
        ({"train_batch_size": 16, "comms_logger": "auto"}, "comms_logger must be an object"),
        ({"train_batch_size": 16, "scheduler": {"type": "auto"}}, "got 'auto'."),
        ({"train_batch_size": 16, "scheduler": {"type": "WarmupDecayLR"}}, "total_num_steps must be given for"),
        ({"train_batch_size": 16, "zero_optimization": {"offload_param": {"device": "cpu"}}}, "only the optimizer can"),
        ({"train_batch_size": 16, "optimizer": {"params": {"lr": "fast"}}}, "lr must be a non-negative number"),
        ({"train_batch_size": 16, "optimizer": {"params": {"betas": [0.9]}}}, "betas must be a list"),
        ({"train_batch_size": 16, "scheduler": {"type": ["WarmupLR"]}}, "scheduler.type must be a string"),
        ({"train_batch_size": 16, "scheduler": {}}, "WarmupCosineLR, got nothing."),
        ({"train_batch_size": 16, "scheduler": {"type": "WarmUpLR"}}, "did you mean 'WarmupLR'"),
        (
            {"train_batch_size": 16, "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "did you mean 'warmup_num_steps'",
        ),
        (
            {"train_batch_size": 16, "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}},
            "cycle_min_lr must be given for OneCycle: neither the recipe nor DeepSpeed has a value",
        ),
        ({"train_batch_size": 10**30}, "below 2^31"),
        ({"train_batch_size": 16, "expert_parallel": {"autoep_size": "big"}}, "autoep_size must be an integer"),
    ),
)  # fmt: skip
def test_wrong_json_is_named(raw, message):
    with pytest.raises(ConfigError) as error:
        resolve(raw, world=4)
    assert message in str(error.value) and str(error.value).startswith("ds.json: ") and "\n" not in str(error.value)


def test_ep_must_divide_experts_and_world():
    with pytest.raises(
        TopologyError, match=r"autoep_size must divide .* 4 rank\(s\) and the 8 expert\(s\), got 3; valid: 1, 2, 4"
    ):
        resolve({"train_batch_size": 16, "expert_parallel": {"autoep_size": 3}}, world=4)


def test_a_second_ep_size_must_agree():
    raw = {"train_batch_size": 16, "expert_parallel": {"autoep_size": 2}}
    assert resolve(raw, "expert_parallel.autoep_size=2", world=4).ep_size == 2
    with pytest.raises(ConfigError, match=r"autoep_size is 4 in the recipe or --set, but 2 in ds\.json"):
        resolve(raw, "expert_parallel.autoep_size=4", world=4)


def test_json_optimizer_wins_and_says_so():
    settings = resolve({"train_batch_size": 8, "optimizer": {"params": {"lr": 0.5, "eps": "auto"}}})
    assert settings.json["optimizer"]["params"]["lr"] == 0.5
    assert any("optimizer.params.lr is 0.5 from ds.json, not the recipe's" in note for note in settings.notes)


AUTO_ZERO = (
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
)  # fmt: skip


def test_every_auto_is_resolved_and_reported():
    """A typical DeepSpeed JSON, with "auto" wherever it is valid."""
    raw = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "wall_clock_breakdown": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "flops_profiler": {"enabled": "auto"},
        "tensorboard": {"enabled": "auto", "output_path": "auto"},
        "expert_parallel": {"autoep_size": "auto"},
        "optimizer": {
            "type": "auto",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay", "torch_adam", "foreach"), "auto"),
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
        "zero_optimization": {
            "stage": 2, **dict.fromkeys(AUTO_ZERO, "auto"),
            "offload_optimizer": {"device": "auto", "pin_memory": "auto"},
        },
    }  # fmt: skip
    settings = resolve(raw, "run.total_images=100", "optimizer.lr=2e-3", world=2)
    assert '"auto"' not in json.dumps(settings.json)
    assert settings.gradient_clipping == 0 and settings.tensorboard and settings.tensorboard_dir is None
    assert settings.json["optimizer"]["type"] == "AdamW" and settings.json["optimizer"]["params"]["torch_adam"] is True
    assert settings.json["scheduler"]["params"] == {"warmup_max_lr": 2e-3, "total_num_steps": 7}
    assert settings.json["zero_optimization"] == {"stage": 2, "offload_optimizer": {}}
    for name in (
        "train_micro_batch_size_per_gpu: auto is 8", "gradient_accumulation_steps: auto is 1",
        "gradient_clipping: auto is 0.0", "steps_per_print: auto is",
        "wall_clock_breakdown: auto is DeepSpeed's default",
        "fp16.enabled: auto is false", "bf16.enabled: auto is false on cpu", "flops_profiler.enabled: auto is",
        "tensorboard.enabled: auto is true", "expert_parallel.autoep_size: auto is 2",
        'optimizer.type: auto is "AdamW"',
        "optimizer.params.lr: auto is 0.002", "optimizer.params.foreach: auto is DeepSpeed's default",
        "scheduler.params.warmup_max_lr: auto is 0.002", "scheduler.params.total_num_steps: auto is 7",
        "scheduler.params.warmup_num_steps: auto is DeepSpeed's default",
        *(f"zero_optimization.{key}: auto is DeepSpeed's default" for key in AUTO_ZERO),
        "zero_optimization.offload_optimizer.device: auto is DeepSpeed's default",
    ):  # fmt: skip
        assert sum(note.startswith(name.split(" auto")[0]) for note in settings.notes) == 1, "each once"
        assert any(note.startswith(name) for note in settings.notes), name


def test_the_throughput_timer_is_off_unless_the_json_has_it():
    """It synchronizes the device twice per step."""
    assert resolve({"train_batch_size": 8}).json["timers"] == {"throughput": {"enabled": False}}
    for section in ({"enabled": True}, {"synchronized": False}):
        assert (
            resolve({"train_batch_size": 8, "timers": {"throughput": section}}).json["timers"]["throughput"] == section
        )
    auto = resolve({"train_batch_size": 8, "timers": {"throughput": {"enabled": "auto"}}})
    assert auto.json["timers"]["throughput"] == {"enabled": False}
    assert "timers.throughput.enabled: auto is false" in auto.notes
    assert "timers" not in auto.beside_layout(), "a resumed run would report it as changed since an older checkpoint"


@pytest.mark.parametrize("raw", [*map(read_deepspeed_json, SHIPPED), load_config("imagenet-256", []).deepspeed])
def test_shipped_gpu_settings_overlap_the_reduction_with_the_backward_pass(raw):
    zero = raw["zero_optimization"]
    if zero["stage"] and raw["bf16"]["enabled"] == "auto":
        assert zero["overlap_comm"] is True and zero["reduce_bucket_size"] == 10**8


@pytest.mark.parametrize(
    ("world", "bf16", "given", "expected"),
    (
        (1, True, None, None),
        (63, True, None, None),
        (64, True, None, "fp32"),
        (1024, True, None, "fp32"),
        (1024, False, None, None),  # DeepSpeed's default for fp32 training is fp32
        (63, True, "auto", "bf16"),
        (64, True, "auto", "fp32"),
        (8, False, "auto", "fp32"),
        (1024, True, "bf16", "bf16"),
        (8, True, "fp32", "fp32"),
    ),
)
def test_bf16_gradients_of_many_ranks_are_summed_in_fp32(world, bf16, given, expected):
    raw = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "expert_parallel": {"autoep_size": 1}}
    settings = resolve({**raw, **({} if given is None else {"communication_data_type": given})}, world=world)
    assert settings.json.get("communication_data_type") == expected
    notes = [note for note in settings.notes if note.startswith("communication_data_type: ")]
    assert len(notes) == (given == "auto" or (given is None and expected is not None)), notes


def test_no_clipping_means_none_and_zero_0_is_clipped_by_us():
    assert resolve({"train_batch_size": 8}).json["gradient_clipping"] == 0.0
    clipped = {"train_batch_size": 8, "gradient_clipping": 0.5}
    at_zero_0, at_zero_1 = resolve(clipped), resolve({**clipped, "zero_optimization": {"stage": 1}})
    assert (at_zero_0.gradient_clipping, at_zero_0.json["gradient_clipping"]) == (0.5, 0.0)
    assert (at_zero_1.gradient_clipping, at_zero_1.json["gradient_clipping"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1,}', "invalid JSON"),
        ("[1]", "must be an object, got a list"),
        (None, "cannot be read: No such file"),
    ),
)
def test_strict_json(tmp_path, text, message):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_json(path)


def test_tensorboard_section_sets_the_directory():
    section = {"enabled": True, "output_path": "logs", "job_name": "mine"}
    settings = resolve({"train_batch_size": 8, "tensorboard": section})
    assert (settings.tensorboard, settings.tensorboard_dir) == (True, "logs/mine")
    assert "tensorboard" not in settings.json, "DeepSpeed would write a second set of files"
    assert not resolve({"train_batch_size": 8, "tensorboard": {"enabled": False}}).tensorboard
    assert resolve({"train_batch_size": 8}).tensorboard_dir is None


def test_all_invalid_keys_are_named_at_once():
    zero = {"stage": 5, "cpu_offload": True}
    with pytest.raises(ConfigError) as caught:
        resolve({"train_batch_sise": 4, "amp": {"enabled": True}, "zero_optimization": zero})
    first, *lines = str(caught.value).split("\n  ")
    assert first == "ds.json: 4 keys are invalid:"
    assert lines[0].startswith("top-level key: 'train_batch_sise' is not known; did you mean 'train_batch_size'?")
    unsupported = "is a DeepSpeed setting that this project does not support"
    assert lines[1:] == [
        f"amp {unsupported}; use bf16.",
        "zero_optimization.stage must be 0, 1, 2 or 3, got 5.",
        f"zero_optimization.cpu_offload {unsupported}; use offload_optimizer.",
    ]


def test_settings_that_are_switched_off_are_dropped():
    """As in DeepSpeed's own examples; what cannot have an effect is dropped, too."""
    off = {
        "prescale_gradients": False, "comet": {"enabled": False, "team": "x"}, "gradient_predivide_factor": 1.0,
        "sparse_gradients": None, "zero_allow_untested_optimizer": True, "flops_profiler": {"enabled": False},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "zero_optimization": {
            "stage": 1, "offload_param": {"device": "none", "pin_memory": True}, "mics_shard_size": -1,
            "stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "none", "ratio": 1.0},
        },
        "bf16": {"enabled": False, "immediate_grad_update": False},
    }  # fmt: skip
    plain = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}
    plain["flops_profiler"] = {"enabled": False}
    found, expected = (resolve({"train_batch_size": 16, **tree}) for tree in (off, plain))
    assert found.json == expected.json
    (note,) = set(found.notes) - set(expected.notes)
    assert note.startswith("without effect here, and dropped: prescale_gradients, comet, ") and "offload_param" in note
    for key, value in (("gradient_predivide_factor", 2), ("activation_checkpointing", {"cpu_checkpointing": True})):
        with pytest.raises(ConfigError, match=f"{key} is a DeepSpeed setting"):
            resolve({"train_batch_size": 16, key: value})


COPIED = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto",
    "fp16": {
        "enabled": "auto", "auto_cast": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
        "hysteresis": 2, "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"}, "amp": {"enabled": "auto", "opt_level": "auto"}, "fp32_allreduce": False,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "adam_w_mode": True,
            "bias_correction": True,
        },
    },
    "scheduler": {
        "type": "WarmupDecayLR", "params": dict.fromkeys(
            ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto",
        ),
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True, "zero_quantized_weights": False,
    },
    "gradient_clipping": "auto", "steps_per_print": 2000, "wall_clock_breakdown": False, "dump_state": False,
    "zero_allow_untested_optimizer": True, "wandb": {"enabled": False}, "aio": {"block_size": 1048576},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
    "flops_profiler": {"enabled": False, "profile_step": 1}, "comms_logger": {"enabled": False, "prof_all": True},
    "data_efficiency": {"enabled": False, "data_sampling": {"num_epochs": 1000}}, "elasticity": {"enabled": False},
    "progressive_layer_drop": {"enabled": False}, "checkpoint": {"load_universal": False},
}  # fmt: skip
"""A file with the sections that examples of DeepSpeed, transformers and accelerate have."""


def test_a_copied_json_is_accepted_where_nothing_unsupported_is_switched_on():
    settings = resolve(COPIED, world=2, device="cuda")
    assert (settings.zero_stage, settings.bf16, settings.offloads_optimizer) == (3, True, True)
    assert '"auto"' not in json.dumps(settings.json)
    dropped = next(note for note in settings.notes if note.startswith("without effect here"))
    for key in ("fp16.loss_scale", "amp", "aio", "elasticity", "optimizer.params.adam_w_mode"):
        assert f" {key}" in dropped


def test_what_a_copied_json_asks_for_is_refused_at_once():
    nvme = {"device": "nvme", "nvme_path": "/ssd"}
    zero = {"stage": 3, "offload_optimizer": nvme, "offload_param": {"device": "cpu"}}
    changes = {
        "fp16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {"type": "Lamb"},
        "scheduler": {"type": "Warmup", "params": {}},
        "moe": {"enabled": True},
        "tensorbord": {"enabled": True},
    }
    with pytest.raises(ConfigError) as caught:
        resolve({**COPIED, **changes})
    first, *lines = str(caught.value).split("\n  ")
    assert first == "ds.json: 7 keys are invalid:" and sum("valid: bf16, comms_logger" in line for line in lines) == 1
    for text in (
        'fp16.enabled must be false or "auto", got True; fp16 is not supported (see docs/deepspeed.md); use bf16',
        "offload_optimizer.device must be none, cpu or \"auto\", got 'nvme'; NVMe offload is not supported (see docs/",
        "offload_param is a DeepSpeed setting that this project does not support; only the optimizer can be offloaded",
        "optimizer.type must be Adam, AdamW, Lion or \"auto\", got 'Lamb'; checkpoints cannot hold",
        "scheduler.type: 'Warmup' is not known; did you mean 'WarmupLR'? valid:",
        "top-level key: 'moe' is not known; valid: bf16,",
        "top-level key: 'tensorbord' is not known; did you mean 'tensorboard'?",
    ):
        assert sum(text in line for line in lines) == 1, text
