"""Every private name of DeepSpeed that this project uses, in one place.

After an upgrade of DeepSpeed, `tests/distributed/test_seam.py` reports those that are gone or have changed. They are:

- `AutoEPMoELayer`: a layer of this class gets expert gradients reduced over its replicas only, expert
  optimizer state partitioned over them, and is allowed under ZeRO 3.
- `_hp_mapping` (ZeRO 1, 2) and `grad_position` (ZeRO 3): where the fp32 master weights and moments of a
  parameter are in a rank's flat partition; our checkpoints and the EMA are made of these fragments.
- `ALL_OPS`, `installed_ops`: which compiled operators exist, and which of them were built with DeepSpeed.
- `groups`: the EP and EDP process groups, created by DeepSpeed so that there is only one of each.
- `cdb`, `PartitionedParameterCoordinator`, `FWD_MODULE_STACK`: they keep process groups alive, see `shutdown`.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.autoep_affine import (
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.git_version_info import installed_ops
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch import Tensor, nn

from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.distributed.clipping import clip_gradients
from diffmoe_ds.distributed.fragments import Fragment, Part
from diffmoe_ds.distributed.rejection import rejection
from diffmoe_ds.topology import Topology

__all__ = ["AutoEPMoELayer", "adopt_layer", "fragments", "initialize", "parts"]

EXPERT_WEIGHTS = ("w1", "w2", "w3")
"""The only parameter names that DeepSpeed looks for in a layer's ``experts``."""
_engines: weakref.WeakSet[deepspeed.DeepSpeedEngine] = weakref.WeakSet()
"""Engines that may still hold process groups."""


def init_process_group(init_method: str = "env://") -> None:
    """Create the default process group through DeepSpeed, by torch's ``init_method``; or adopt the one that exists."""
    # On a CPU, DeepSpeed would spend a minute compiling a shared-memory all-reduce that it hardly uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() != "cpu":
        # DeepSpeed uses LOCAL_RANK as the device index; where each task sees only its own GPU, that is always 0.
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % get_accelerator().device_count())
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, init_method=init_method)


def expert_parallel_group(ep_size: int, *, replicas: bool = False) -> dist.ProcessGroup:
    """Return this rank's EP group of consecutive ranks or, instead, the group that holds the same experts."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size)
    find = groups._get_expert_data_parallel_group if replicas else groups._get_expert_parallel_group
    group: dist.ProcessGroup = find(name)
    return group


def adopt_layer(layer: AutoEPMoELayer, topology: Topology, ep_group: dist.ProcessGroup) -> None:
    """Give a layer the attributes that DeepSpeed's engine and optimizers read from an AutoEP layer."""
    layer.num_local_experts = topology.num_local_experts
    layer.ep_size = topology.ep_size
    layer.ep_rank = topology.ep_rank
    layer.ep_group_name = f"ep_size_{topology.ep_size}"
    layer.ep_group = ep_group
    layer.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
        topology.num_experts, topology.num_local_experts, topology.ep_size
    )
    layer.folding_group_handles = None
    layer.tp_group = None
    layer.combine_impl = "weighted_sum"
    layer.comm_backend = "comm"


def tag_expert_weights(model: nn.Module) -> None:
    """Mark the expert weights of all AutoEP layers. Call this after the last change of parameter objects."""
    for layer in model.modules():
        if not isinstance(layer, AutoEPMoELayer):
            continue
        first = layer.ep_rank * layer.num_local_experts
        for name in EXPERT_WEIGHTS:
            weight = getattr(layer.experts, name)
            assert weight.dim() == 3, "DeepSpeed stacks and loads expert weights as [experts, rows, columns] only"
            weight.allreduce = False
            weight.group_name = layer.ep_group_name
            weight.ds_zero_placement_family = "autoep_expert"
            weight.ds_zero_partition_group_name = layer.ep_group_name
            logical = [layer.num_experts, *weight.shape[1:]]
            affine = autoep_placement_to_affine_map(layer.expert_placement_descriptor, logical)
            meta = {
                AUTOEP_EXPERT_PLACEMENT: layer.expert_placement_descriptor,
                AFFINE_MAP: affine.to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical,
                AUTOEP_PARAM_EP_RANK: layer.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(range(first, first + layer.num_local_experts)),
            }
            setattr(weight, DS_AUTOEP_UC_META, meta)


def initialize(model: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Return the DeepSpeed engine of a model with tagged expert weights.

    Args:
        model: see `tag_expert_weights`.
        config: the resolved DeepSpeed JSON.

    Raises:
        ConfigError: DeepSpeed rejects the configuration, or cannot compile its own optimizer.
    """
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    except Exception as error:
        rejected = rejection(error, config["optimizer"]["type"])
        if rejected is None:
            raise
        raise rejected from error
    _engines.add(engine)
    return engine


def release_engines() -> None:
    """Remove the hooks of all engines: through autograd's graph they keep an engine and its groups alive."""
    for engine in list(_engines):
        with contextlib.suppress(RuntimeError):  # initialization was interrupted
            engine.destroy()
    _engines.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # DeepSpeed wraps the methods for NVTX
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()  # one cache over the modules of all instances
    parameter_offload.FWD_MODULE_STACK.clear()  # the last model stays in it, and its parameters refer to their groups


def forget_groups() -> None:
    """Drop DeepSpeed's references to process groups that were destroyed."""
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    groups._ALL_TO_ALL_GROUP.clear()
    groups._WORLD_GROUP = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    deepspeed_comm.cdb = None


def parts(engine: deepspeed.DeepSpeedEngine) -> dict[str, Part]:
    """Return the part of every parameter, by name."""
    layers = {id(p): layer for layer in _expert_layers(engine.module) for p in layer.experts.parameters()}
    found = {}
    for name, parameter in engine.module.named_parameters():
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # empty under ZeRO 3
        layer = layers.get(id(parameter))
        if layer is None:
            found[name] = Part(tuple(shape), 0, shape.numel(), engine.seq_data_parallel_group)
        else:
            group = groups._get_expert_data_parallel_group(layer.ep_group_name)
            logical = (layer.num_experts, *shape[1:])
            found[name] = Part(logical, layer.ep_rank * shape.numel(), shape.numel(), group)
    return found


def fragments(engine: deepspeed.DeepSpeedEngine) -> list[Fragment]:
    """Return all fragments that this rank keeps, in parameter order; works at every ZeRO stage."""
    _ensure_moments(engine)
    found = []
    every = parts(engine)
    for name, parameter in engine.module.named_parameters():
        part = every[name]
        for offset, fp32, moments, is_owner in _pieces(engine, parameter, part.group):
            found.append(Fragment(name, offset, part.first + offset, fp32, moments, is_owner))
    return found


def _expert_layers(model: nn.Module) -> Iterator[AutoEPMoELayer]:
    return (layer for layer in model.modules() if isinstance(layer, AutoEPMoELayer))


Piece = tuple[int, Tensor, dict[str, Tensor], bool]


def _pieces(engine: deepspeed.DeepSpeedEngine, parameter: Any, group: dist.ProcessGroup) -> Iterator[Piece]:
    """Yield (offset in the rank's part, master weights, moments, owner) of a parameter; nothing if others keep it."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer = engine.optimizer
        flat_index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[flat_index]
        start = dist.get_rank(group) * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last partition is padded
        if numel > 0:
            yield start, flat.data.narrow(0, offset, numel), _moments(_inner(engine), flat, offset, numel), True
    elif stage in (1, 2):
        mapping = parameter._hp_mapping
        if mapping is not None:
            address = mapping.lp_fragment_address
            moments = {key: mapping.get_optim_state_fragment(key) for key in _moment_names(_inner(engine))}
            yield address.start, mapping.hp_fragment.data.view(-1), moments, True
    else:
        is_owner = dist.get_rank(group) == 0
        flat, offset = _unpartitioned_master(engine, parameter)
        numel = parameter.numel()
        yield 0, flat.data.view(-1).narrow(0, offset, numel), _moments(_inner(engine), flat, offset, numel), is_owner


def _moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MOMENTS["Lion" if isinstance(optimizer, (DeepSpeedCPULion, FusedLion)) else "AdamW"]


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
    names = _moment_names(optimizer)
    return {key: optimizer.state[flat][key].view(-1).narrow(0, offset, numel) for key in names}


def _unpartitioned_master(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Return the master weights at ZeRO 0 and the offset in them: the parameter itself, or its fp32 copy (bf16)."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups"):
        return parameter, 0
    for index, members in enumerate(optimizer.fp16_groups):
        offset = 0
        for number, member in enumerate(members):
            if member is parameter:
                if hasattr(optimizer, "fp32_groups_flat"):  # DeepSpeed's FusedAdam
                    return optimizer.fp32_groups_flat[index], offset
                return optimizer.fp32_groups[index][number], 0
            offset += member.numel()
    raise AssertionError("every trained parameter is in one of the optimizer's groups")


def _ensure_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Create the moments now instead of at the first step, so that a checkpoint can be loaded into them."""
    inner = _inner(engine)
    for flat in _masters(engine):
        state = inner.state[flat]
        if "exp_avg" not in state:
            # torch's Adam counts steps in a tensor, the fused one on the weights' device; DeepSpeed's in a number
            device = flat.device if inner.defaults.get("fused") else "cpu"
            state["step"] = torch.zeros((), device=device) if isinstance(inner, torch.optim.Adam) else 0
            names = _moment_names(inner)
            state.update({key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in names})
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    set_adam_step(engine, 0)  # DeepSpeed's bf16 wrapper takes a zero-gradient step to create its state


def _inner(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """Return the tensors that the optimizer updates: flat fp32 partitions, or the parameters (ZeRO 0, fp32)."""
    if engine.zero_optimization_stage() == 3:  # where the optimizer's groups are filled only during a step
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in _inner(engine).param_groups for flat in group["params"]]


def step(engine: deepspeed.DeepSpeedEngine, max_norm: float) -> Tensor | float | None:
    """Clip at ``max_norm`` (0: never) and take the optimizer step at the end of accumulation.

    Returns:
        The global 2-norm of the gradient before clipping, still on the device if it need not be known here. None if it
        is non-finite: the gradients were discarded, and the weights and the learning rate did not change.
    """
    if engine.zero_optimization_stage():
        engine.step()  # DeepSpeed clips, and discards non-finite gradients
        norm: Tensor | float | None = engine.get_global_grad_norm()
        return None if engine.optimizer.overflow else norm
    norm = _clip_unpartitioned(engine, max_norm)
    if math.isfinite(norm):
        engine.step()
        return norm
    # DeepSpeed cannot skip this step, but has to count it and discard the gradients.
    before = None if engine.lr_scheduler is None else (engine.lr_scheduler.state_dict(), scheduled(engine))
    engine.optimizer.step = lambda: None
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    if before is not None:
        _restore_schedule(engine, *before)
    return None


def _clip_unpartitioned(engine: deepspeed.DeepSpeedEngine, max_norm: float) -> float:
    """Clip at ZeRO 0, where DeepSpeed takes the norm over this rank's experts only, which differs between ranks."""
    layers = list(_expert_layers(engine.module))
    experts = {id(p) for layer in layers for p in layer.experts.parameters()}
    return clip_gradients(engine.module.parameters(), experts, layers[0].ep_group if layers else None, max_norm)


def scheduled(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """Return the values that a scheduler has set in the optimizer; its own state does not contain them."""
    group = _inner(engine).param_groups[0]
    return {"lr": float(group["lr"]), "betas": list(group["betas"])}


def _restore_schedule(engine: deepspeed.DeepSpeedEngine, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Restore a scheduler and the values it had set in the optimizer."""
    engine.lr_scheduler.load_state_dict(state)
    for optimizer in {id(o): o for o in (engine.optimizer, _inner(engine))}.values():
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = now["lr"], tuple(now["betas"])


def adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """Return the optimizer's number of updates, which Adam's bias correction uses."""
    steps = [_inner(engine).state[flat]["step"] for flat in _masters(engine)]
    return int(torch.stack(steps).max() if torch.is_tensor(steps[0]) else max(steps))  # copies from the device once


def set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Set the optimizer's number of updates, which Adam's bias correction uses."""
    for flat in _masters(engine):
        state = _inner(engine).state[flat]
        state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def operator_state(name: str) -> str:
    """Return ``prebuilt``, ``possible`` or ``impossible`` for one of DeepSpeed's compiled operators on this host."""
    if installed_ops.get(name):
        return "prebuilt"
    return "possible" if name in ALL_OPS and ALL_OPS[name].is_compatible(verbose=False) else "impossible"
