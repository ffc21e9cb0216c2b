"""The DeepSpeed JSON: parsed strictly, validated and fully resolved before it is passed to DeepSpeed.

DeepSpeed itself accepts misspelled keys silently, drops ``"auto"`` or fails on it, and clips gradients at 1.0 by
default. Here an unknown key is an error that names the nearest known one, clipping is off by default, and every
``"auto"`` is resolved and reported: to the recipe's value, to what the ranks and the device require, or to DeepSpeed's
default.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe_ds.config import deepspeed_sections as sections
from diffmoe_ds.config.deepspeed_keys import check_keys
from diffmoe_ds.config.deepspeed_optimizer import resolve_optimizer
from diffmoe_ds.config.nearest import did_you_mean, unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.config.shipped import deepspeed_json_path, shipped_jsons
from diffmoe_ds.control_files import MAX_TEXT_BYTES, parse_json, read_text
from diffmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A fully resolved DeepSpeed configuration."""

    json: dict[str, Any]
    """The configuration passed to `deepspeed.initialize`."""
    global_batch: int
    """Images per optimizer step, over all ranks."""
    micro_batch: int
    """Images per forward pass of one rank."""
    accumulation: int
    """Forward passes of a rank per optimizer step; each has its own pool."""
    ep_size: int
    """Expert-parallel size P: ranks that share one set of experts."""
    zero_stage: int
    """0 to 3."""
    bf16: bool
    """Weights and activations in bf16 with fp32 master weights; otherwise everything in fp32."""
    gradient_clipping: float
    """Maximum 2-norm of the gradient; 0 disables clipping."""
    offloads_optimizer: bool
    """Whether master weights and Adam are in host memory."""
    tensorboard: bool
    """Whether to write TensorBoard files."""
    tensorboard_dir: str | None
    """Their directory, if the JSON names one; otherwise they go into the run directory."""
    notes: tuple[str, ...]
    """One sentence for each value that was resolved or changed."""

    def beside_layout(self) -> dict[str, Any]:
        """Return the JSON without layout, batch sizes and timers: precision, optimizer, clipping, scheduler, ..."""
        without = (*sections.BATCH_KEYS, "expert_parallel", "timers")
        tree = {key: value for key, value in self.json.items() if key not in without}
        zero = {key: value for key, value in self.json["zero_optimization"].items() if key != "stage"}
        return {**tree, "zero_optimization": zero, "gradient_clipping": self.gradient_clipping}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; duplicate keys and NaN are errors.

    Args:
        path: the file, or the name of a shipped one, such as ``zero2``.

    Raises:
        ConfigError: the file does not exist, cannot be read or is invalid.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in items)
        duplicate = min((key for key, count in counts.items() if count > 1), default=None)
        if duplicate is not None:
            raise ConfigError(f"{path}: duplicate key {duplicate!r}.")
        return dict(items)

    try:
        tree = parse_json(read_text(deepspeed_json_path(path), MAX_TEXT_BYTES), pairs)
    except FileNotFoundError as error:
        names = shipped_jsons()
        if Path(path).name == str(path) and not Path(path).suffix:
            raise ConfigError(f"{unknown('--deepspeed_config', path, names)} It can also be a path.") from None
        hint = did_you_mean(Path(path).stem, names)
        raise ConfigError(
            f"--deepspeed_config {path}: cannot be read: {error.strerror}; {hint}files that come with the package have "
            f"names: {', '.join(names)}."
        ) from None
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read: {error.strerror}.") from None
    except ConfigError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, NaN, a number of 5,000 digits, 10,000 brackets
        raise ConfigError(f"--deepspeed_config {path}: invalid JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--deepspeed_config {path}: must be an object, got a {type(tree).__name__}.")
    return tree


def resolve_deepspeed(
    raw: dict[str, Any], config: Config, source: str, *, world: int, local_world: int, device: str,
    is_prebuilt: Callable[[str], bool] = lambda operator: False,
) -> DeepSpeedSettings:  # fmt: skip
    """Check a DeepSpeed configuration against DeepSpeed's keys, the recipe and the ranks, and fill it in.

    Args:
        raw: the JSON's content; not modified.
        config: the recipe, for values that are ``"auto"``.
        source: the file's name, for errors.
        world: number of ranks W.
        local_world: ranks on this host; ``autoep_size: auto`` does not exceed it.
        device: device type, ``cpu``, ``cuda``, ...
        is_prebuilt: whether an operator of DeepSpeed was compiled when it was installed; called for GPUs only.

    Returns:
        The settings, without any ``"auto"``.

    Raises:
        ConfigError: unknown or unsupported keys, invalid values, inconsistent batch sizes.
        TopologyError: an expert-parallel size that does not divide the experts or the ranks.
    """
    check_keys(raw, source)
    job = sections.Resolution(copy.deepcopy(raw), config, source, world, local_world, device, is_prebuilt)
    tree = job.tree
    sections.drop_switched_off(job)
    global_batch, micro, accumulation = sections.resolve_batch(job)
    zero_stage = sections.check_zero(job)
    bf16 = sections.resolve_precision(job)
    sections.resolve_reduction(job, bf16)
    resolve_optimizer(job)
    sections.resolve_scheduler(job, global_batch)
    ep_size = sections.resolve_expert_parallel(job)
    clipping = sections.resolve_clipping(job)
    sections.resolve_reports(job)
    tensorboard = sections.resolve_monitors(job)
    tree.update(
        train_batch_size=global_batch,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        # At ZeRO 0, DeepSpeed's norm covers only this rank's experts, so each rank would clip differently;
        # `deepspeed_seam.step` clips by the global norm instead.
        gradient_clipping=clipping if zero_stage else 0.0,
    )
    sections.drop_autos(job)
    return DeepSpeedSettings(
        json=tree, global_batch=global_batch, micro_batch=micro, accumulation=accumulation, ep_size=ep_size,
        zero_stage=zero_stage, bf16=bf16, gradient_clipping=clipping, offloads_optimizer=job.offloads_optimizer,
        tensorboard=tensorboard[0], tensorboard_dir=tensorboard[1], notes=tuple(job.notes),
    )  # fmt: skip
