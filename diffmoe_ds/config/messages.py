"""Convert pydantic's validation errors to one sentence: the key, the valid values, and the value found."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from diffmoe_ds.config.fields import WRONG_TYPE, printable, short_repr
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.reference import definition, range_in_words, schema, value_schema

UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
EXPECTED = {
    "bool_type": "true or false",
    "string_type": "a string",
    "model_type": "a section with keys",
}


def explain(error: ValidationError) -> tuple[str, str]:
    """Return the key of the first error, and one sentence; unknown keys come first, as they often explain the others.

    The key is empty for values that do not fit together.
    """
    details = error.errors(include_url=False)
    first = min(details, key=lambda detail: detail["type"] not in UNKNOWN_KEY)  # stable: else the first one
    return "" if first["type"] == "value_error" else _name(first["loc"]), _sentence(first)


def _sentence(detail: ErrorDetails) -> str:
    kind, place, value = detail["type"], detail["loc"], detail["input"]
    name = _name(place)
    if kind == "value_error":  # our own ConfigError, already complete
        return str(detail["ctx"]["error"])
    if kind in UNKNOWN_KEY:
        return unknown(name, place[-1], _siblings(place))
    if kind == "literal_error":
        return unknown(name, value, _field(place)["enum"])
    expected = detail["ctx"]["expected"] if kind == WRONG_TYPE else EXPECTED.get(kind) or range_in_words(_field(place))
    return f"{name or 'the configuration'} must be {expected}, got {short_repr(value)}."


def _name(place: tuple[int | str, ...]) -> str:
    """Return the key as users write it: ``optimizer.betas[1]``."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    return printable(name)


def _siblings(place: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys in the section of an unknown one."""
    owner = schema() if len(place) == 1 else definition(str(place[0]))
    return list(owner["properties"])


def _field(place: tuple[int | str, ...]) -> dict[str, Any]:
    """Return the JSON schema of the value at ``section.key`` or ``section.key[item]``."""
    field = value_schema(definition(str(place[0]))["properties"][place[1]])
    if len(place) < 3:
        return field
    item: dict[str, Any] = field["prefixItems"][place[2]] if "prefixItems" in field else field["items"]
    return item
