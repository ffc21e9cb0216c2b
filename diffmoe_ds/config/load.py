"""From a recipe, ``--set`` and defaults to a checked `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

DEFAULT_RECIPE = "fashion"


def recipes() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    folder = Path(str(resources.files("diffmoe_ds.config") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(recipe: str | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``--set a.b=value`` in order.

    Args:
        recipe: name of a packaged recipe or path of a YAML file; none takes the embedded recipe.
        overrides: ``section.key=value`` with the value in YAML.

    Raises:
        ConfigError: unknown file, section or key, wrong type, or values that do not fit together.
    """
    path = _recipe_path(recipe or DEFAULT_RECIPE)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, but a recipe is a mapping of sections.")
    for override in overrides:
        _apply(tree, override)
    return _build(Config, tree, "", str(path))


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def config_from_dict(tree: dict[str, Any], source: str) -> Config:
    """A checked `Config` from plain data, such as what a checkpoint stores; errors name ``source``."""
    return _build(Config, tree, "", source)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain data (dicts, lists, numbers, strings)."""
    return _plain(dataclasses.asdict(config))


class _ScalarError(yaml.constructor.ConstructorError):
    """A value has the form of a type, or says that it is of it, and is no value of it."""


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which makes plain data only; it refuses a key that stands twice and a value that is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise OverflowError  # no key takes it, and Python does not even print all of them
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
            # 2024-13-45, 0b_, !!bool x, !!int "", !!timestamp x, a number of 5,000 digits
            kind = {"int": "whole number of at most 64 bits", "float": "number", "bool": "truth value"}
            tag = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} is no {kind.get(tag, tag)}; quote it if it is text"
            raise _ScalarError(None, None, problem, node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands there twice")
        return super().construct_mapping(node, deep)


def _recipe_path(recipe: str) -> Path:
    known = recipes()
    if recipe in known:
        return known[recipe]
    if Path(recipe).is_file():
        return Path(recipe)
    raise ConfigError(unknown("--config", recipe, known) + " A path of a YAML file works too.")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value.")
    try:
        value = yaml.load(text, _StrictLoader)
    except _ScalarError as error:
        raise ConfigError(f"--set {key}: {error.problem}.") from None
    except (yaml.YAMLError, RecursionError):
        value = text  # a string with YAML's special characters, such as a path with braces
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        child = node[section] = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section.")
        node = child
    node[last] = value


def _build(cls: type, tree: Any, where: str, source: str) -> Any:
    """A dataclass from a mapping, refusing what is not a field of it."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {where or 'the file'} is {tree!r}, but it must be a section with keys.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"{source}: " + unknown(name, key, hints))
        values[key] = _convert(hints[key], value, name, source)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _convert(hint: Any, value: Any, name: str, source: str) -> Any:
    """Check one value against a field's type; 5 may stand for 5.0 and 1e5 for 100_000, and 1e-4 is a number."""

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{source}: {name} is {value!r}, but it must be {expected}.")

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, name, source)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, name, source)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{source}: " + unknown(name, value, [str(a) for a in arguments]))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise wrong(f"a list of {len(arguments)} numbers")
        return tuple(_convert(a, v, name, source) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise wrong("a section with keys")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint is int:
        return _whole(value, wrong)
    if hint is float:
        return _number(value, wrong)
    assert hint is str, f"no conversion for the type {hint} of {name}"
    if not isinstance(value, str):
        raise wrong("text")
    return value


def _whole(value: Any, wrong: typing.Callable[[str], ConfigError]) -> int:
    if not isinstance(value, int):
        try:
            number = _number(value, wrong)
        except ConfigError:
            raise wrong("a whole number") from None
        value = int(number) if number.is_integer() else None
    if value is None or isinstance(value, bool):
        raise wrong("a whole number")
    if value.bit_length() > 64:
        raise wrong("a whole number of at most 64 bits")
    return value


def _number(value: Any, wrong: typing.Callable[[str], ConfigError]) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            raise wrong("a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise wrong("a finite number")
    return float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
