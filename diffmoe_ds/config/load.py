"""Load a validated `Config` from a recipe, ``--set`` and defaults, and dump it as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffmoe_ds.config.fields import printable
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.config.strict_yaml import MalformedValueError, parse_yaml, read_yaml
from diffmoe_ds.control_files import MAX_DEPTH
from diffmoe_ds.errors import ConfigError

DEFAULT_RECIPE = "fashion"
BASE = "base"
"""Key of a recipe with the name or path of the recipe from which it inherits."""


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe with its ``base`` and ``--set``, not validated yet."""

    source: str
    """The recipe's name, for errors."""
    tree: dict[str, Any]
    """Sections with their keys."""
    own: dict[str, Any]
    """The part that the user has set, in files or with ``--set``: the tree without the packaged recipes."""
    changed: list[str]
    """Keys that ``--set`` has set."""

    @property
    def init_from(self) -> str | None:
        """The value of ``model.init_from``; None if it is invalid, which `config` reports."""
        model = self.tree.get("model")
        found = model.get("init_from") if isinstance(model, dict) else None
        return found if isinstance(found, str) else None

    def sets(self, key: str) -> bool:
        """Return whether the user has set a key, ``section.key``."""
        section, _, name = key.partition(".")
        values = self.own.get(section)
        return isinstance(values, dict) and name in values

    def config(self, inherited: Mapping[str, Any] | None = None) -> Config:
        """Return the validated configuration.

        Args:
            inherited: sections with values for the keys that the user has not set.

        Raises:
            ConfigError: unknown file, section or key, wrong type, or values that do not fit together.
        """
        tree = _merged(_merged(self.tree, dict(inherited or {})), self.own)
        return _validated(tree, self.source, self.changed)


def recipes() -> dict[str, Path]:
    """Return the paths of the packaged recipes by name."""
    folder = Path(str(resources.files("diffmoe_ds.config") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(recipe: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``--set a.b=value`` in order.

    Args:
        recipe: name of a packaged recipe or path of a YAML file; None for the default recipe.
        overrides: ``section.key=value`` with the value in YAML.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: unknown file, section or key, wrong type, or values that do not fit together.
    """
    return read_recipe(recipe, overrides).config()


def read_recipe(recipe: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and ``--set`` as `load_config` does, without validating the values.

    Raises:
        ConfigError: a file does not exist or is not YAML, or ``--set`` has the wrong form.
    """
    recipe = recipe or DEFAULT_RECIPE
    tree, own = _read(recipe_path(recipe))
    changed = [_apply(tree, override) for override in overrides]
    for override in overrides:
        _apply(own, override)
    return Recipe(recipe, tree, own, changed)


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: name of a packaged recipe or path of a YAML file.

    Raises:
        ConfigError: neither exists.
    """
    return _find("--config", recipe, Path(recipe))


def _find(what: str, recipe: str, path: Path) -> Path:
    """Return a packaged recipe by its name, or else the path."""
    known = recipes()
    if recipe in known:
        return known[recipe]
    if os.path.isfile(path):  # pathlib's raises for a name that is too long
        return path
    if len(Path(recipe).parts) > 1 or recipe.startswith("./") or path.suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"{what} {recipe}: the file does not exist; `diffmoe init IMAGES` writes one that fits your images, and "
            f"packaged recipes have names: {', '.join(known)}."
        )
    raise ConfigError(
        f"{unknown(what, recipe, known)} It can also be the path of a YAML file; `diffmoe init IMAGES` writes one that "
        "fits your images."
    )


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a recipe over that of its ``base``, and the part of it that is not packaged.

    Args:
        path: the file.
        heirs: the recipes that inherit from it.
    """
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}.") from None
    if tree is None:  # an empty file
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe must be a mapping of sections, got a {type(tree).__name__}.")
    own = {} if path in recipes().values() else tree
    if BASE not in tree:
        return _merged({}, tree), _merged({}, own)
    base = tree.pop(BASE)
    if not isinstance(base, str):
        found = "nothing" if base is None else repr(base)
        raise ConfigError(f"{path}: {BASE} must be the name or the path of a recipe, got {found}.")
    parent = _find(f"{path}: {BASE}", base, path.parent / base)
    line = (*heirs, path)
    if parent.resolve() in [heir.resolve() for heir in line]:
        raise ConfigError(f"{path}: {BASE}: {base} inherits from this recipe.")
    inherited, inherited_own = _read(parent, line)
    return _merged(inherited, tree), _merged(inherited_own, own)


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a recipe over that of its base; sections are merged, other values are replaced."""
    merged = dict(base)
    for key, value in tree.items():
        inherited = base.get(key)
        if isinstance(value, dict):
            value = _merged(inherited if isinstance(inherited, dict) else {}, value)
        elif value is None and isinstance(inherited, dict):
            value = inherited  # an empty section is null
        merged[key] = value
    return merged


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML, which `load_config` reads back unchanged."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def config_from_dict(tree: dict[str, Any], source: str) -> Config:
    """Build a validated `Config` from plain data, such as that in a checkpoint.

    Args:
        tree: sections with their keys; missing ones take their defaults.
        source: origin of the data, for errors.

    Raises:
        ConfigError: unknown section or key, wrong type, or values that do not fit together.
    """
    return _validated(tree, source, ())


def _validated(tree: dict[str, Any], source: str, changed: Sequence[str]) -> Config:
    """Build a `Config`; errors name ``--set`` if the invalid key was set there.

    Args:
        tree: the content of a recipe.
        source: its name.
        changed: keys that ``--set`` has set.
    """
    from diffmoe_ds.config.messages import explain

    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        key, sentence = explain(error)
    named = key or sentence.partition(":")[0]
    if any(f"{named}.".startswith(f"{name}.") or f"{name}.".startswith(f"{named}.") for name in changed):
        raise ConfigError(f"--set: {sentence}")
    raise ConfigError(f"{source}{' with --set' if changed and not key else ''}: {sentence}")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data (dicts, lists, numbers, strings)."""
    plain: dict[str, Any] = _plain(config.model_dump())
    return plain


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations as plain data: (before, after) by dotted key, None if missing."""
    old, new = flatten(before), flatten(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into a dict keyed by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _apply(tree: dict[str, Any], override: str) -> str:
    """Set one key of a recipe's content from ``section.key=value``, and return its name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set must have the form section.key=value, got {override!r}.")
    if key.count(".") > MAX_DEPTH:
        raise ConfigError(f"--set must have the form section.key=value, got {override[:80]!r}...")
    try:
        value = parse_yaml(text)
    except MalformedValueError as error:
        raise ConfigError(f"--set {printable(key)}: {error.problem}.") from None
    except yaml.YAMLError:
        value = text  # a string with YAML's special characters, such as a path with braces
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        child = node[section] = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section.")
        node = child
    content = node.get(last)
    if value is None and not sections and isinstance(content, dict) and content:
        raise ConfigError(
            f"--set {override}: {last} is a section; set its keys, as in {last}.{next(iter(content))}=..."
        )
    node[last] = value
    return key


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
