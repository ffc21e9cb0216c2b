"""The contract with DeepSpeed: when a release renames or changes something private, the failing test names it."""

from __future__ import annotations

import inspect

import pytest
import torch

from diffmoe_ds.config.deepspeed_keys import KEYS, SCHEDULES
from diffmoe_ds.config.deepspeed_unsupported import is_known

seam = pytest.importorskip("diffmoe_ds.distributed.deepspeed_seam")


@pytest.mark.parametrize(
    ("module", "names"),
    (
        ("deepspeed.module_inject.auto_ep_layer", ("AutoEPMoELayer",)),
        (
            "deepspeed.utils.groups",
            (
                "_create_expert_and_data_parallel", "_get_expert_parallel_group", "_get_expert_data_parallel_group",
                "_get_expert_parallel_group_dict", "_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP",
                "_ALL_TO_ALL_GROUP", "_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
            ),
        ),
        ("deepspeed.comm.comm", ("cdb",)),
        (
            "deepspeed.checkpoint.constants",
            (
                "DS_AUTOEP_UC_META", "AFFINE_MAP", "AUTOEP_EXPERT_PLACEMENT", "AUTOEP_PARAM_EP_RANK",
                "AUTOEP_PARAM_LOCAL_EXPERTS", "AUTOEP_PARAM_LOGICAL_SHAPE",
            ),
        ),
        (
            "deepspeed.checkpoint.autoep_affine",
            ("autoep_placement_to_affine_map", "legacy_uniform_autoep_placement_descriptor"),
        ),
        ("deepspeed.runtime.zero.stage_1_and_2", ("DeepSpeedZeroOptimizer",)),
        ("deepspeed.runtime.zero.stage3", ("DeepSpeedZeroOptimizer_Stage3",)),
        ("deepspeed.runtime.zero.parameter_offload", ("FWD_MODULE_STACK",)),
        ("deepspeed.runtime.zero.partitioned_param_coordinator", ("PartitionedParameterCoordinator",)),
    ),
)  # fmt: skip
def test_private_names_exist(module, names):
    found = __import__(module, fromlist=["_"])
    missing = [f"{module}.{name}" for name in names if not hasattr(found, name)]
    assert not missing, f"gone from DeepSpeed: {missing}"


def test_layer_attributes_that_deepspeed_reads_are_set():
    """`adopt_layer` must set every attribute that AutoEPMoELayer's methods and the engine read."""
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.runtime import engine

    layer = torch.nn.Module()
    seam.adopt_layer(layer, seam.Topology(rank=1, world=2, ep_size=2, num_experts=4), ep_group=None)
    source = inspect.getsource(auto_ep_layer.AutoEPMoELayer.set_deepspeed_parallelism)
    for name in ("ep_group_name", "ep_size", "combine_impl", "comm_backend"):
        assert f"self.{name}" in source, f"set_deepspeed_parallelism no longer reads {name}"
        assert hasattr(layer, name)
    source = inspect.getsource(engine.DeepSpeedEngine)
    for name in ("ep_group_name", "num_local_experts", "expert_placement_descriptor", "ep_rank"):
        assert f"module.{name}" in source, f"the engine no longer reads {name} of an AutoEP layer"
        assert hasattr(layer, name)
    assert (layer.ep_rank, layer.num_local_experts) == (1, 2)


@pytest.mark.parametrize(
    ("module", "fragment", "why"),
    (
        ("deepspeed.runtime.zero.stage3", "self.grad_position[param_id] = ", "place of a ZeRO-3 partition"),
        ("deepspeed.runtime.zero.stage3", "self.fp32_partitioned_groups_flat", "ZeRO-3 master weights"),
        ("deepspeed.runtime.zero.stage3", "def get_param_id", "ZeRO-3 parameter numbers"),
        ("deepspeed.runtime.zero.stage_1_and_2", "_lazy_init_hp_params_optimizer_state", "moments by parameter"),
        ("deepspeed.utils.mixed_precision_linkage", "lp_param._hp_mapping = ", "master weights by parameter"),
        ("deepspeed.utils.tensor_fragment", "lp_fragment_address", "where a fragment starts"),
        ("deepspeed.runtime.fp16.fused_optimizer", "self.fp32_groups_flat", "bf16 master weights at ZeRO 0"),
        ("deepspeed.runtime.fp16.unfused_optimizer", "self.fp32_groups", "bf16 master weights at ZeRO 0"),
        ("deepspeed.moe.utils", '"allreduce") and not param.allreduce', "how expert weights are told apart"),
        (
            "deepspeed.runtime.zero.stage_1_and_2",
            "tensor.div_(dist.get_world_size(group=self.dp_process_group)",
            "expert gradients are divided by the whole world, so that EP does not change them",
        ),
    ),
)
def test_source_that_the_seam_relies_on_is_unchanged(module, fragment, why):
    source = inspect.getsource(__import__(module, fromlist=["_"]))
    assert fragment in source, f"{module}: {fragment!r} is gone ({why})"


def test_expert_weights_must_be_stacked():
    layer = seam.AutoEPMoELayer.__new__(seam.AutoEPMoELayer)
    torch.nn.Module.__init__(layer)
    seam.adopt_layer(layer, seam.Topology(0, 1, 1, 2), ep_group=None)
    layer.num_experts = 2
    layer.experts = torch.nn.Module()
    for name in seam.EXPERT_WEIGHTS:
        setattr(layer.experts, name, torch.nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(AssertionError, match=r"\[experts, rows, columns\]"):
        seam.tag_expert_weights(layer)


def test_schedules_have_the_parameters_that_the_configuration_knows():
    """`config/deepspeed_keys.py` lists them in a table, so that checking a configuration does not import DeepSpeed."""
    from deepspeed.runtime import lr_schedules

    found = {}
    for name in lr_schedules.VALID_LR_SCHEDULES:
        parameters = inspect.signature(getattr(lr_schedules, name)).parameters.values()
        found[name] = {p.name: p.default is p.empty for p in parameters if p.name != "optimizer"}
    assert found == SCHEDULES


def test_deepspeeds_keys_are_known_to_the_configuration():
    """A key that a release adds must be passed on, ignored or refused with an alternative."""
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config

    sections = {
        "zero_optimization": (zero.DeepSpeedZeroConfig, KEYS["zero_optimization"]),
        "zero_optimization.offload_optimizer": (
            offload_config.DeepSpeedZeroOffloadOptimizerConfig, KEYS["zero_optimization"]["offload_optimizer"],
        ),
        "bf16": (precision_config.DeepSpeedBF16Config, KEYS["bf16"]),
        "fp16": (precision_config.DeepSpeedFP16Config, KEYS["fp16"]),
    }  # fmt: skip
    for section, (model, keys) in sections.items():
        names = [field.alias or name for name, field in model.model_fields.items()]
        unknown = [name for name in names if name not in keys and not is_known(section, name)]
        assert not unknown, f"{section}: {unknown}"
    assert all(is_known("", key) for key in config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert all(is_known("zero_optimization", key) for key in config._REMOVED_ZERO_CONFIG_KEYS)
