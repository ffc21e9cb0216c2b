"""Every private name of DeepSpeed that this project uses, in one place.

`tests/distributed/test_seam.py` says which of them is gone or has changed when DeepSpeed is upgraded.
What each is for:

- `AutoEPMoELayer`: a layer of this class gets expert gradients reduced over its replicas only, expert
  optimizer state partitioned over them, and is allowed under ZeRO 3.
- `_hp_mapping` (ZeRO 1, 2) and `grad_position` (ZeRO 3): where the fp32 master weights and Adam moments of a
  parameter lie in a rank's flat partition; our checkpoints and the EMA are made of these fragments.
- `ALL_OPS`, `installed_ops`: which compiled operators exist, and which of them were built with DeepSpeed.
- `groups`: the EP and EDP process groups, made by DeepSpeed so that there is only one of each.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # say so, else DeepSpeed warns that it found nothing better

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
from deepspeed.git_version_info import installed_ops
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from diffmoe_ds.errors import ConfigError
from diffmoe_ds.topology import Topology

__all__ = ["AutoEPMoELayer", "Fragment", "Part", "adopt_layer", "fragments", "initialize", "parts"]

EXPERT_WEIGHTS = ("w1", "w2", "w3")
"""The only parameter names that DeepSpeed looks for in a layer's ``experts``."""


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's own log to errors, and its calls of older torch.distributed names to itself."""
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))


def init_process_group() -> None:
    """Join the world through DeepSpeed; the environment must hold RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for a minute and use it for few things.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() != "cpu":
        # DeepSpeed takes LOCAL_RANK for the device's number; where each task sees its own GPU only, that is always 0.
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % get_accelerator().device_count())
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def expert_parallel_group(ep_size: int) -> dist.ProcessGroup:
    """This rank's EP group of consecutive ranks, created together with the groups of expert replicas."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size)
    return groups._get_expert_parallel_group(name)


def adopt_layer(layer: nn.Module, topology: Topology, ep_group: dist.ProcessGroup) -> None:
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
    """Mark the expert weights of all AutoEP layers; to be called when the parameters are the final objects."""
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
    """The DeepSpeed engine of a model with tagged expert weights, from an already resolved configuration.

    Raises:
        ConfigError: DeepSpeed does not take the configuration.
    """
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    except (AssertionError, TypeError, ValueError) as error:  # its own checks; a failed collective is a RuntimeError
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"DeepSpeed refuses its configuration: {type(error).__name__}: {reason}") from error
    return engine


@dataclass(frozen=True)
class Part:
    """What this rank computes with of one parameter: all of it, or the experts held here."""

    logical_shape: tuple[int, ...]
    """Shape of the whole tensor; for expert weights with all E experts."""
    first: int
    """First element of the part in the flattened logical tensor."""
    numel: int
    """Elements of the part."""
    group: dist.ProcessGroup
    """The ranks that compute with the same part; together they keep its master weights."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of a part that this rank keeps in fp32 and updates."""

    name: str
    """The parameter's name in the model."""
    offset: int
    """First element of the piece in the flattened part."""
    start: int
    """First element of the piece in the flattened logical tensor."""
    fp32: Tensor
    """The master weights of the piece: a flat view into what the optimizer updates."""
    moments: dict[str, Tensor]
    """Adam's ``exp_avg`` and ``exp_avg_sq`` of the piece, flat views; both exist from the start."""
    is_owner: bool
    """False where another rank keeps the same piece (ZeRO 0) and writes it to checkpoints."""


def parts(engine: deepspeed.DeepSpeedEngine) -> dict[str, Part]:
    """The part of every parameter, by name."""
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
    """All pieces that this rank keeps, in the order of the parameters; at every ZeRO stage."""
    _ensure_moments(engine)
    found = []
    every = parts(engine)
    for name, parameter in engine.module.named_parameters():
        part = every[name]
        for offset, fp32, moments, is_owner in _pieces(engine, parameter, part.group):
            found.append(Fragment(name, offset, part.first + offset, fp32, moments, is_owner))
    return found


def _expert_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in model.modules() if isinstance(layer, AutoEPMoELayer))


Piece = tuple[int, Tensor, dict[str, Tensor], bool]


def _pieces(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, group: dist.ProcessGroup) -> Iterator[Piece]:
    """(offset in the rank's part, master weights, moments, owner) of a parameter; none if it lies elsewhere."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer = engine.optimizer
        flat_index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[flat_index]
        start = dist.get_rank(group) * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)  # the last partition is padded
        if numel > 0:
            yield start, flat.data.narrow(0, offset, numel), _moments(_adam(engine), flat, offset, numel), True
    elif stage in (1, 2):
        mapping = parameter._hp_mapping
        if mapping is not None:
            address = mapping.lp_fragment_address
            moments = {key: mapping.get_optim_state_fragment(key) for key in MOMENTS}
            yield address.start, mapping.hp_fragment.data.view(-1), moments, True
    else:
        is_owner = dist.get_rank(group) == 0
        flat, offset = _unpartitioned_master(engine, parameter)
        numel = parameter.numel()
        yield 0, flat.data.view(-1).narrow(0, offset, numel), _moments(_adam(engine), flat, offset, numel), is_owner


MOMENTS = ("exp_avg", "exp_avg_sq")


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
    return {key: optimizer.state[flat][key].view(-1).narrow(0, offset, numel) for key in MOMENTS}


def _unpartitioned_master(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """ZeRO 0: the parameter itself in fp32, or its fp32 copy beside a bf16 model, alone or in a flat group."""
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
    """Adam makes its moments at the first step; make them now so that a checkpoint can be read into them."""
    inner = _adam(engine)
    for flat in _masters(engine):
        state = inner.state[flat]
        if "exp_avg" not in state:
            # torch's Adam counts in a tensor, DeepSpeed's in a number
            state["step"] = torch.zeros(()) if isinstance(inner, torch.optim.Adam) else 0
            state.update({key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in MOMENTS})
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    set_adam_step(engine, 0)  # DeepSpeed's bf16 wrapper makes its states with a step of zeros, which counts


def _adam(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """What Adam updates on this rank: flat fp32 partitions, or the parameters themselves (ZeRO 0, fp32)."""
    if engine.zero_optimization_stage() == 3:  # where Adam's groups are filled only during a step
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in _adam(engine).param_groups for flat in group["params"]]


def step(engine: deepspeed.DeepSpeedEngine, max_norm: float) -> float:
    """The optimizer step at the end of accumulation, clipped at ``max_norm`` unless that is 0.

    Returns:
        The 2-norm of the whole gradient before clipping.  If it is not finite, nothing was updated, the gradients are
        gone and the learning rate has not moved.
    """
    if engine.zero_optimization_stage():
        engine.step()  # DeepSpeed clips, and discards a gradient whose norm is not finite
        norm = engine.get_global_grad_norm()
        return float("nan") if norm is None or norm < 0 else float(norm)
    norm = _clip_unpartitioned(engine, max_norm)
    if math.isfinite(norm):
        engine.step()
        return norm
    # DeepSpeed has no way to skip this step, but must count it and drop the gradients.
    scheduler = engine.lr_scheduler
    before = None if scheduler is None else (scheduler.state_dict(), scheduled(engine))
    engine.optimizer.step = lambda: None
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    if before is not None:
        restore_schedule(engine, *before)
    return norm


def _clip_unpartitioned(engine: deepspeed.DeepSpeedEngine, max_norm: float) -> float:
    """The 2-norm of the whole gradient at ZeRO 0, which is scaled down to ``max_norm`` unless that is 0.

    DeepSpeed takes the norm over the experts held by a rank there, which differs between ranks.
    """
    layers = list(_expert_layers(engine.module))
    expert_ids = {id(p) for layer in layers for p in layer.experts.parameters()}
    gradients = [(id(p) in expert_ids, p.grad) for p in engine.module.parameters() if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=engine.device)  # dense, experts held here
    for is_expert, gradient in gradients:
        squares[int(is_expert)] += gradient.detach().double().square().sum()
    if layers:
        dist.all_reduce(squares[1:], group=layers[0].ep_group)
    norm = squares.sum().sqrt().item()
    if 0 < max_norm < norm < math.inf:
        torch._foreach_mul_([gradient for _, gradient in gradients], max_norm / norm)
    return norm


def scheduled(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What a scheduler has set in the optimizer; its own state does not hold it."""
    group = _adam(engine).param_groups[0]
    return {"lr": float(group["lr"]), "betas": list(group["betas"])}


def restore_schedule(engine: deepspeed.DeepSpeedEngine, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Put a scheduler, and what it had set, back to where they were."""
    engine.lr_scheduler.load_state_dict(state)
    for optimizer in {id(o): o for o in (engine.optimizer, _adam(engine))}.values():
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = now["lr"], tuple(now["betas"])


def adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """How many updates Adam has made, as its bias correction counts them."""
    return max(int(_adam(engine).state[flat]["step"]) for flat in _masters(engine))


def set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Set Adam's count of updates, which its bias correction uses."""
    for flat in _masters(engine):
        state = _adam(engine).state[flat]
        state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def operators(names: Iterable[str]) -> dict[str, str]:
    """For each of DeepSpeed's compiled operators: ``prebuilt``, ``compiled at first use``, or why it cannot be."""
    tools = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    if torch.cuda.is_available() and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        tools.append("nvcc")
    found = {}
    for name in names:
        if installed_ops.get(name):
            found[name] = "prebuilt"
        elif name not in ALL_OPS or not ALL_OPS[name].is_compatible(verbose=False):
            found[name] = "not possible here"
        else:
            found[name] = f"cannot be compiled: no {', '.join(tools)}" if tools else "compiled at first use"
    return found
