"""Every key of the configuration as data: its type, default, range and meaning.

`diffmoe config`, ``docs/configuration.md`` and the error messages all read it from the JSON schema that pydantic makes
of `Config`, so none of them can contradict the checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from diffmoe_ds.config.schema import Config

TYPES = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false", "object": "section"}
LARGE = 2**53
"""Bounds from here on are printed as powers of two or in scientific notation."""


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    """Full name, such as ``run.seed``."""
    type: str
    """Type in words, such as "integer" or "list of 2 numbers"."""
    default: Any
    """Value without a recipe; ``None`` where another key or the embedded data decide."""
    choices: tuple[str, ...]
    """All valid values, if they can be listed; the model's names are left to its meaning."""
    range: str
    """Completes "must be ..."; empty if every value of the type is valid."""
    meaning: str
    """The field's documentation, in Markdown on one line."""


@dataclass(frozen=True)
class SectionKeys:
    """One section with its keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


@cache
def schema() -> dict[str, Any]:
    """Return pydantic's JSON schema of `Config`, shared: do not modify it."""
    return Config.model_json_schema()


@cache
def sections() -> dict[str, SectionKeys]:
    """Return all sections by name, in the order of `Config`; ``deepspeed`` has no keys here."""
    found = {}
    for name, entry in schema()["properties"].items():
        fields = definition(name).get("properties", {})
        keys = tuple(_key(f"{name}.{key}", field) for key, field in fields.items())
        meaning = definition(name).get("description") or entry["description"]
        found[name] = SectionKeys(name, _one_line(meaning), keys)
    return found


def keys_named(name: str) -> list[str]:
    """Return the full names of the keys with this name, which may include the section; ``lr`` is ``optimizer.lr``."""
    every = [key.name for section in sections().values() for key in section.keys]
    return [key for key in every if name in (key, key.partition(".")[2])]


def definition(section: str) -> dict[str, Any]:
    """Return the JSON schema of a section."""
    entry: dict[str, Any] = schema()["properties"][section]
    if "$ref" in entry:
        entry = schema()["$defs"][entry["$ref"].rpartition("/")[2]]
    return entry


def value_schema(field: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a field's schema that is not null."""
    return next((part for part in field.get("anyOf", ()) if part.get("type") != "null"), field)


def range_in_words(value: dict[str, Any]) -> str:
    """Return the words that complete "must be ..." for the bounds in a JSON schema; empty without bounds."""
    low, above = value.get("minimum"), value.get("exclusiveMinimum")
    high, below = value.get("maximum"), value.get("exclusiveMaximum")
    words = []
    if above is not None:
        words.append("positive" if above == 0 else f"greater than {_bound(above)}")
    if low is not None:
        words.append("non-negative" if low == 0 and high is below is None else f"at least {_bound(low)}")
    if high is not None:
        words.append(f"at most {_bound(high)}")
    if below is not None:
        words.append(f"less than {_bound(below)}")
    return " and ".join(words)


def _key(name: str, field: dict[str, Any]) -> Key:
    value = value_schema(field)
    if isinstance(value["type"], list):  # a single string is also valid
        value = {**value, "type": value["type"][0]}
    kind, choices, bounds = TYPES.get(value["type"], ""), tuple(value.get("enum", ())), range_in_words(value)
    if value["type"] == "array":
        if "prefixItems" in value:
            items = value["prefixItems"]
            kind, bounds = f"list of {len(items)} {TYPES[items[0]['type']]}s", f"each {range_in_words(items[0])}"
        elif "enum" in value["items"]:
            *names, last = value["items"]["enum"]
            kind, bounds = "list of names", f"each one of {', '.join(names)} or {last}"
        else:
            kind = "list of strings" if value["items"]["type"] == "string" else "list"
    return Key(name, kind, field.get("default"), choices, bounds, _one_line(field.get("description", "")))


def _bound(value: float) -> str:
    if abs(value) < LARGE:
        return f"{value:g}"
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if value == 2**exponent else f"{value:g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
