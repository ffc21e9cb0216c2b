"""The YAML file with which the reference implementation trained a model.

The reference copies it into the directory of the experiment, next to its ``checkpoints/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.strict_yaml import read_yaml
from diffmoe_ds.errors import ConfigError

TARGETS = {
    "models.models_DiT.DiT": "dense",
    "models.models_TCDiT.DiT": "tc",
    "models.models_ECDiT.DiT": "ec",
    "models.models_DiffMoE.DiT": "diffmoe",
}
"""``model.target`` of each model class."""
DEFAULTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}
"""Values of ``model.params`` that the reference's classes assume."""
PARAMETERS = {*DEFAULTS, "use_swiglu", "MoE_config", "init_MoeMLP", "head_dim", "CapacityPred_loss_weight"}
"""Values of ``model.params`` that we understand; ``init_MoeMLP`` concerns only the initial weights."""
EXPERTS = {"n_shared_experts", "num_experts", "capacity", "init_MoeMLP", "interleave", "capacity_schedule"}
"""Values of ``MoE_config`` that we understand; a capacity schedule ends at ``capacity``."""


def read_reference_yaml(path: Path) -> dict[str, Any]:
    """Return the configuration of a model, as in `load_official`, from the reference's YAML.

    Args:
        path: the file; it may also hold what `load_official` takes itself, with the keys kind, model and moe.

    Raises:
        ConfigError: the file cannot be read, is not such a file, or configures what we do not support.
    """
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}.") from None
    if isinstance(tree, dict) and "kind" in tree and isinstance(tree.get("model"), dict):
        return tree
    if not _is_reference(tree):
        raise ConfigError(f"{path}: not a configuration of the reference: model.target or model.params is missing.")
    basic, target = tree.get("basic") or {}, tree["model"]["target"]
    if not isinstance(target, str) or target not in TARGETS:
        raise ConfigError(f"{path}: {unknown('model.target', str(target)[:80], TARGETS)}")
    params = _section(path, "model.params", tree["model"]["params"], PARAMETERS)
    experts = _section(path, "model.params.MoE_config", params.pop("MoE_config", None) or {}, EXPERTS)
    if not isinstance(basic, dict) or basic.get("rf_ori"):
        raise ConfigError(f"{path}: basic.rf_ori: this flow is not supported; valid: rf: true, or neither (DDPM).")
    moe = {} if TARGETS[target] == "dense" else experts
    for key in ("num_experts", "capacity") if TARGETS[target] != "dense" else ():
        if key not in moe:
            raise ConfigError(f"{path}: model.params.MoE_config.{key} is missing.")
        if not _is_number(moe[key]):
            raise ConfigError(f"{path}: model.params.MoE_config.{key}: must be a number, got {short_repr(moe[key])}.")
    model = DEFAULTS | params
    for key in DEFAULTS:
        if not (_is_number(model[key]) or isinstance(model[key], bool)):
            raise ConfigError(f"{path}: model.params.{key}: must be a number, got {short_repr(model[key])}.")
    return {"kind": TARGETS[target], "model": model, "moe": moe, "rf": bool(basic.get("rf"))}


def find_reference_yaml(weights: Path) -> Path | None:
    """Return the reference's YAML beside a file of weights, or beside its directory ``checkpoints``, if there is one.

    If there is none, a file that is not valid YAML is returned; reading it reports what is wrong.

    Raises:
        ConfigError: there are several.
    """
    folders = [weights.parent, *([weights.parent.parent] if weights.resolve().parent.name == "checkpoints" else [])]
    invalid: list[Path] = []
    for folder in folders:
        files = {path: _can_be(path) for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".yml")}
        found = [path for path, is_reference in files.items() if is_reference]
        invalid += [path for path, is_reference in files.items() if is_reference is None]
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise ConfigError(f"{weights}: found several configurations ({names}); choose one with --reference-config.")
        if found:
            return found[0]
    return invalid[0] if invalid else None


def _can_be(path: Path) -> bool | None:
    """Return whether a file is the reference's YAML; None if it cannot be read as YAML."""
    try:
        return _is_reference(read_yaml(path))
    except (OSError, yaml.YAMLError, ValueError):
        return None


def _is_reference(tree: Any) -> bool:
    model = tree.get("model") if isinstance(tree, dict) else None
    return isinstance(model, dict) and "target" in model and isinstance(model.get("params"), dict)


def _section(path: Path, name: str, values: Any, known: set[str]) -> dict[str, Any]:
    """Return a mapping whose keys are all known; without keys that are empty, which the reference takes as unset."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {name}: must be a mapping, got {short_repr(values)}.")
    for key, value in values.items():
        if key not in known and value is not None:
            raise ConfigError(f"{path}: {name}.{key}: not supported, so the model would differ from the reference's.")
    return {key: value for key, value in values.items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
