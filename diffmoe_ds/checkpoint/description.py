"""What checkpoints and exported models say about their model: configuration, class names and text encoders."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffmoe_ds.config.load import config_from_dict, config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.text import reason, shortened
from diffmoe_ds.text_features import TextFormat, text_format

OLDER_DEFAULTS: dict[str, dict[str, Any]] = {"ema": {"warmup": False}, "data": {"shuffle": "whole"}}
"""Values of keys in configurations from before the keys existed, where these differ from today's defaults."""


class Description(NamedTuple):
    """A model, without its weights."""

    config: Config
    """Configuration of the run that trained it."""
    class_names: tuple[str, ...] | None = None
    """Name of each label; None if labels have no names."""
    text: TextFormat | None = None
    """The encoders of a text model; None for a class model."""

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        tree: dict[str, Any] = {}
        if self.class_names is not None:
            tree["class_names"] = list(self.class_names)
        if self.text is not None:
            tree["text"] = self.text.to_json()
        return {**tree, "config": config_to_dict(self.config)}


def read_description(tree: dict[str, Any], source: str) -> Description:
    """Return the description in the plain data of a file, as `Description.to_json` returns it.

    Versions without ``ema.warmup`` had no warm-up, and those without ``data.shuffle`` had the order of ``whole``.

    Args:
        tree: the contents of the file, which may have other keys.
        source: name of the file, for messages.

    Raises:
        CheckpointError: a value is missing or invalid.
    """
    try:
        config = config_from_dict(_with_older_defaults(tree.get("config")), source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    names = tree.get("class_names")
    if names is not None and (type(names) is not list or not all(type(name) is str for name in names)):
        raise CheckpointError(f"{source}: class_names is {shortened(repr(names))}, but it must be a list of strings.")
    text = _text(tree.get("text"), config, source) if config.is_text else None
    return Description(config, None if names is None else tuple(names), text)


def _with_older_defaults(tree: Any) -> Any:
    """Return a stored configuration with `OLDER_DEFAULTS` for the keys that it lacks."""
    if not isinstance(tree, dict):
        return tree
    sections = {name: tree.get(name, {}) for name in OLDER_DEFAULTS}
    return {
        **tree,
        **{name: {**OLDER_DEFAULTS[name], **old} for name, old in sections.items() if isinstance(old, dict)},
    }


def _text(tree: Any, config: Config, source: str) -> TextFormat:
    try:
        found = text_format(tree)
    except ValueError as error:
        raise CheckpointError(f"{source}: text must describe the encoders of a text model: {reason(error)}.") from None
    if found.shapes != config.model.text_encoders:
        raise CheckpointError(
            f"{source}: text describes encoders of shapes {found.shapes}, but model.text_encoders is "
            f"{config.model.text_encoders}."
        )
    return found
