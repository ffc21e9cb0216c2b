"""The DeepSpeed JSON: read strictly, resolved completely, handed to DeepSpeed without surprises.

DeepSpeed itself accepts misspelt keys silently, drops or trips over ``"auto"`` and clips gradients at 1.0 unless
told otherwise.  Here an unknown key is refused with the nearest known one, no clipping means none, and every
``"auto"`` is resolved and reported: with the recipe's value, with what the ranks and the device ask for, or with
DeepSpeed's default.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe_ds.config.deepspeed_keys import AUTO, check_keys
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.topology import Topology, largest_ep_size

OPTIMIZERS = ("Adam", "AdamW")
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
STEPS_PER_PRINT = 10**9
"""DeepSpeed's own line is silent, because ours says more."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed configuration without open questions."""

    json: dict[str, Any]
    """What `deepspeed.initialize` gets."""
    global_batch: int
    """Images of an optimizer step, over all ranks."""
    micro_batch: int
    """Images of one forward pass of one rank."""
    accumulation: int
    """Forward passes of a rank per optimizer step; each has a pool of its own."""
    ep_size: int
    """Ranks P that share one set of experts."""
    zero_stage: int
    """0 to 3."""
    bf16: bool
    """Weights and activations in bf16 with fp32 master weights; otherwise everything in fp32."""
    gradient_clipping: float
    """Largest 2-norm of the gradient; 0 does not clip."""
    tensorboard: bool
    """Write TensorBoard files."""
    tensorboard_dir: str | None
    """Where, if the JSON says; otherwise inside the run directory."""
    notes: tuple[str, ...]
    """One sentence for each value that was resolved or changed."""

    def beside_layout(self) -> dict[str, Any]:
        """The JSON without layout and batch sizes: precision, optimizer, clipping, scheduler, ..."""
        tree = {key: value for key, value in self.json.items() if key not in (*BATCH_KEYS, "expert_parallel")}
        zero = {key: value for key, value in self.json["zero_optimization"].items() if key != "stage"}
        return {**tree, "zero_optimization": zero, "gradient_clipping": self.gradient_clipping}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Strict JSON: an object, no key twice, no NaN.

    Raises:
        ConfigError: the file cannot be read or is not such JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(f"{path}: the key {sorted(twice)[0]!r} stands there twice.")
        return dict(items)

    def constant(name: str) -> float:
        raise ConfigError(f"{path}: {name} is not a JSON number.")

    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read: {error.strerror}.") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, 10,000 brackets
        raise ConfigError(f"--deepspeed_config {path}: is not valid JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--deepspeed_config {path}: holds a {type(tree).__name__}, but it must be an object.")
    return tree


def resolve_deepspeed(
    raw: dict[str, Any], config: Config, source: str, *, world: int, local_world: int, device: str
) -> DeepSpeedSettings:
    """Check a DeepSpeed configuration against DeepSpeed's keys, the recipe and the ranks, and fill it in.

    Args:
        raw: the JSON's content.
        config: the recipe, for what ``"auto"`` takes from it.
        source: the file's name, for errors.
        world: number of ranks W.
        local_world: ranks on this host, within which ``autoep_size: auto`` stays.
        device: ``cpu``, ``cuda``, ...

    Raises:
        ConfigError: unknown or unsupported keys, impossible values, batch arithmetic that does not work out.
        TopologyError: an EP size that does not divide the experts or the ranks.
    """
    check_keys(raw, source)
    tree = copy.deepcopy(raw)
    notes: list[str] = []
    global_batch, micro, accumulation = _batch(tree, world, source, notes)
    zero_stage = _zero(tree, source)
    bf16 = _precision(tree, device, source, notes)
    _optimizer(tree, config, device, source, notes)
    steps = -(-config.run.total_images // global_batch)
    _scheduler(tree, {"warmup_max_lr": tree["optimizer"]["params"]["lr"], "total_num_steps": steps}, source, notes)
    ep_size = _expert_parallel(tree, config, world, local_world, source, notes)
    _auto(tree, "gradient_clipping", 0.0, notes)  # as without the key
    clipping = tree.get("gradient_clipping", 0.0)
    _auto(tree, "steps_per_print", STEPS_PER_PRINT, notes)
    tensorboard, directory = _tensorboard(tree, notes)
    tree.update(
        train_batch_size=global_batch,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        # At ZeRO 0 DeepSpeed's norm is that of the experts held here, so each rank would clip differently;
        # the engine set-up clips there with the true norm.
        gradient_clipping=float(clipping) if zero_stage else 0.0,
        steps_per_print=tree.get("steps_per_print", STEPS_PER_PRINT),
    )
    _leave_out_autos(tree, "", notes)
    return DeepSpeedSettings(
        json=tree, global_batch=global_batch, micro_batch=micro, accumulation=accumulation, ep_size=ep_size,
        zero_stage=zero_stage, bf16=bf16, gradient_clipping=float(clipping), tensorboard=tensorboard,
        tensorboard_dir=directory, notes=tuple(notes),
    )  # fmt: skip


def _auto(section: dict[str, Any], key: str, found: Any, notes: list[str], where: str = "") -> None:
    """Put what was found where "auto" stands, and say so."""
    if section.get(key) == AUTO:
        section[key] = found
        notes.append(f"{where}{key}: auto is {json.dumps(found)}")


def _leave_out_autos(section: dict[str, Any], where: str, notes: list[str]) -> None:
    """What "auto" is left stands for DeepSpeed's default, which it takes for a key that is not there."""
    for key, value in list(section.items()):
        if isinstance(value, dict):
            _leave_out_autos(value, f"{where}{key}.", notes)
        elif value == AUTO:
            del section[key]
            notes.append(f"{where}{key}: auto is DeepSpeed's default")


def _batch(tree: dict[str, Any], world: int, source: str, notes: list[str]) -> tuple[int, int, int]:
    """train_batch_size = micro * accumulation * world, with up to two of the three left open."""
    names = BATCH_KEYS
    values: list[int | None] = []
    for name in names:
        value = tree.get(name, AUTO)
        values.append(None if value == AUTO else value)
    total, micro, accumulation = values
    if total is None and micro is None:
        raise ConfigError(f"{source}: {names[0]} or {names[1]} must be a number; the other can be left to {AUTO!r}.")
    if accumulation is None:
        accumulation = total // (micro * world) if total and micro and total % (micro * world) == 0 else 1
    if total is None:
        total = micro * accumulation * world
    if micro is None:
        micro = total // (accumulation * world)
    if micro < 1 or micro * accumulation * world != total:
        raise ConfigError(
            f"{source}: train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {world} rank(s) = {micro * accumulation * world}; "
            f"a batch size for these ranks is a multiple of {(values[1] or 1) * accumulation * world}."
        )
    resolved = zip(names, values, (total, micro, accumulation), strict=True)
    notes.extend(f"{name}: auto is {found}" for name, given, found in resolved if given is None and name in tree)
    return total, micro, accumulation


def _zero(tree: dict[str, Any], source: str) -> int:
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0)
    if zero.get("reduce_scatter", True) not in (True, AUTO):
        raise ConfigError(
            f"{source}: zero_optimization.reduce_scatter must be true: without it DeepSpeed adds up the gradients of "
            "different experts."
        )
    if stage == 2 and zero.get("contiguous_gradients", True) not in (True, AUTO):
        raise ConfigError(
            f"{source}: zero_optimization.contiguous_gradients must be true at stage 2: DeepSpeed needs it for experts."
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload == "cpu" and stage == 0:
        raise ConfigError(f"{source}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, but stage is 0.")
    return stage


def _precision(tree: dict[str, Any], device: str, source: str, notes: list[str]) -> bool:
    fp16 = tree.pop("fp16", {})
    _auto(fp16, "enabled", False, notes, "fp16.")
    if fp16.get("enabled", False) is not False:
        raise ConfigError(f"{source}: fp16.enabled: fp16 is not supported; use bf16, or neither for fp32.")
    bf16 = tree.get("bf16", {}).get("enabled", False)
    if bf16 == AUTO:
        bf16 = device != "cpu"
        notes.append(f"bf16.enabled: auto is {str(bf16).lower()} on {device}")
    # Else DeepSpeed applies a bf16 gradient that is not finite; in fp32 it discards one by itself.
    tree["bf16"] = {"enabled": bf16, "check_grad_overflow": True}
    return bf16


def _optimizer(tree: dict[str, Any], config: Config, device: str, source: str, notes: list[str]) -> None:
    optimizer = tree.setdefault("optimizer", {})
    _auto(optimizer, "type", "AdamW", notes, "optimizer.")
    kind = optimizer.setdefault("type", "AdamW")
    if kind not in OPTIMIZERS:
        raise ConfigError(f"{source}: " + unknown("optimizer.type", kind, OPTIMIZERS))
    params = optimizer.setdefault("params", {})
    for key in ("lr", "betas", "eps", "weight_decay"):
        ours = getattr(config.optimizer, key)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if params.get(key, AUTO) == AUTO:
            if key in params:
                notes.append(f"optimizer.params.{key}: auto is {ours}")
            params[key] = ours
        elif params[key] != ours:
            notes.append(f"optimizer.params.{key} is {params[key]} from {source}, not the recipe's {ours}")
    if device == "cpu" and params.get("torch_adam", AUTO) == AUTO:
        params["torch_adam"] = True
        notes.append("optimizer.params.torch_adam: true, as DeepSpeed's own Adam needs a compiler on a CPU")


def _scheduler(tree: dict[str, Any], found: dict[str, Any], source: str, notes: list[str]) -> None:
    """DeepSpeed's schedulers take their parameters as arguments; what they are it says only in their signatures.

    ``found`` is what "auto" stands for, of the parameters that the run decides.
    """
    section = tree.get("scheduler")
    if section is None:
        return
    from deepspeed.runtime import lr_schedules  # takes seconds, and few runs have a scheduler

    kind, params = section.get("type"), section.get("params", {})
    if kind == AUTO:
        raise ConfigError(
            f'{source}: scheduler.type is "auto", but a recipe has no schedule; name one or leave it out.'
        )
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        raise ConfigError(f"{source}: " + unknown("scheduler.type", kind, lr_schedules.VALID_LR_SCHEDULES))
    valid = dict(inspect.signature(getattr(lr_schedules, kind)).parameters)
    del valid["optimizer"]
    for key in params:
        if key not in valid:
            raise ConfigError(f"{source}: " + unknown("scheduler.params", key, valid))
        if key in found:
            _auto(params, key, found[key], notes, "scheduler.params.")
    for key, parameter in valid.items():
        if parameter.default is inspect.Parameter.empty and params.get(key, AUTO) == AUTO:
            raise ConfigError(
                f"{source}: scheduler.params.{key} must be given: neither the recipe nor DeepSpeed has a value for the "
                f"{key} of {kind}."
            )


def _expert_parallel(
    tree: dict[str, Any], config: Config, world: int, local_world: int, source: str, notes: list[str]
) -> int:
    section = tree.setdefault("expert_parallel", {})
    if section.pop("enabled", None):
        # Enabled, DeepSpeed looks for a Hugging Face model whose experts it could replace.
        notes.append("expert_parallel.enabled is not passed on: the model brings its own expert-parallel layers")
    ep_size = section.get("autoep_size", 1 if config.num_experts == 1 else AUTO)
    if ep_size == AUTO:
        ep_size = largest_ep_size(config.num_experts, world, local_world)
        notes.append(f"expert_parallel.autoep_size: auto is {ep_size}")
    repeated = config.expert_parallel.autoep_size
    if repeated is not None and repeated != ep_size:
        raise ConfigError(
            f"expert_parallel.autoep_size is {repeated} in the recipe or --set, but {ep_size} in {source}, which is "
            "the one place to set it."
        )
    Topology(rank=0, world=world, ep_size=ep_size, num_experts=config.num_experts)
    tree["expert_parallel"] = {"autoep_size": ep_size}
    return ep_size


def _tensorboard(tree: dict[str, Any], notes: list[str]) -> tuple[bool, str | None]:
    """We write the files ourselves; DeepSpeed's own writer would put a second set beside them."""
    section = tree.pop("tensorboard", {"enabled": True})
    for key, found in (("enabled", True), ("output_path", ""), ("job_name", "")):  # as without the section
        _auto(section, key, found, notes, "tensorboard.")
    enabled = section.get("enabled", False)
    path = section.get("output_path") or None
    return enabled, str(Path(path) / section.get("job_name", "")) if path else None
