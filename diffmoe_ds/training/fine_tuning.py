"""Start a run from the weights of another model (``model.init_from``), whose architecture it takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from diffmoe_ds.checkpoint.architecture import first_difference
from diffmoe_ds.checkpoint.export import require_weights
from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.config.load import Recipe, config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

INHERITED = {
    "model": (
        "name", "hidden_size", "depth", "num_heads", "input_size", "in_channels", "patch_size", "label_dropout",
        "mlp_ratio", "mlp", "qk_norm", "norm", "positions", "conditioning", "text_qk_norm",
    ),
    "routing": (
        "kind", "num_experts", "capacity", "interleave", "dense_blocks", "expert_mlp", "expert_width",
        "shared_experts", "shared_width", "unconditional_expert", "affinity", "score", "router_input", "renormalize",
        "weight_scale", "groups", "groups_kept", "bias_rate", "per_layer_weight", "capacity_predictor",
    ),
    "objective": (
        "kind", "flow_time_scale", "flow_direction", "time_distribution", "time_mean", "time_std", "time_shift",
    ),
}  # fmt: skip
"""Keys of the initial model that apply unless the user sets them; the number of classes is that of the new images."""
ADAPTABLE = ("num_classes", "label_dropout", "text_encoders", "repa_weight", "repa_hidden", "repa_features")
"""Keys that may differ from those of the initial model: they decide its class embedding and REPA's projector alone. The
text encoders must be the same, which `TrainPlan.with_start` checks when those of the new images are known."""


class Start(NamedTuple):
    """Where a run with ``model.init_from`` starts."""

    config: Config
    """The recipe with the initial model's architecture."""
    initial: WeightsReader | None
    """The initial model; None if the run resumes."""
    inherited: tuple[str, ...]
    """What the recipe did not say, as ``section.key value``."""


def resolve_start(recipe: Recipe, resumed: Config | None = None) -> Start:
    """Complete a recipe that has ``model.init_from``.

    Args:
        recipe: keys that it does not set are those of the initial model.
        resumed: the configuration in the run's own checkpoint, if it resumes; the initial model is then not needed.

    Raises:
        CheckpointError: the initial model is missing or damaged.
        ConfigError: the recipe is invalid, or sets a key that contradicts the initial model.
    """
    if resumed is not None:
        return Start(recipe.config(_inherited(recipe, resumed)), None, ())
    initial = require_weights(Path(str(recipe.init_from)), "model.init_from")
    inherited = _inherited(recipe, initial.config)
    config = recipe.config(inherited)
    different = first_difference(initial.config, config, except_for=ADAPTABLE)
    if different is not None:
        key, old, new = different
        raise ConfigError(
            f"model.init_from {recipe.init_from}: {key} is {old!r} in that model and {new!r} in this run; omit "
            f"{_cause(recipe, key, initial.config, config)} to take it over."
        )
    return Start(config, initial, _changes(recipe, inherited))


def _inherited(recipe: Recipe, model: Config) -> dict[str, Any]:
    """Return the sections with those keys of a model that the user has not set."""
    values = config_to_dict(model)
    found = {
        section: {key: values[section][key] for key in keys if not recipe.sets(f"{section}.{key}")}
        for section, keys in INHERITED.items()
    }
    if not recipe.sets("model.num_classes"):
        found["model"]["num_classes"] = "auto"
    return found


def _cause(recipe: Recipe, key: str, saved: Config, wanted: Config) -> str:
    """Return the key that the user must omit; a size may follow from ``model.name``."""
    was, now = config_to_dict(saved), config_to_dict(wanted)
    names = [(section, name) for section, keys in INHERITED.items() for name in keys]
    causes = (
        f"{section}.{name}"
        for section, name in names
        if recipe.sets(f"{section}.{name}") and now[section][name] != was[section][name]
    )
    return key if recipe.sets(key) else next(causes, key)


def _changes(recipe: Recipe, inherited: dict[str, Any]) -> tuple[str, ...]:
    """Return which inherited values differ from those of the packaged recipe, or else the defaults."""
    defaults = config_to_dict(Config())
    found = []
    for section, values in inherited.items():
        packaged = recipe.tree.get(section)
        before = {**defaults[section], **(packaged if isinstance(packaged, dict) else {})}
        found += [f"{section}.{key} {value}" for key, value in values.items() if before[key] != value]
    return tuple(found)
