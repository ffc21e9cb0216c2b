"""The JSON schema of a recipe, for completion and validation in editors.

It rejects what `load_config` rejects about single keys: unknown keys, wrong types, values out of range. Checks across
keys and against the ranks are left to `load_config` and `resolve_deepspeed`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from diffmoe_ds.config.deepspeed_keys import AUTO, KEYS, Value
from diffmoe_ds.config.deepspeed_unsupported import IGNORED, UNSUPPORTED
from diffmoe_ds.config.fields import MAX_BITS
from diffmoe_ds.config.load import BASE
from diffmoe_ds.config.reference import schema

DRAFT = "https://json-schema.org/draft/2020-12/schema"
LARGEST = {"integer": 2**MAX_BITS - 1, "number": sys.float_info.max}


def recipe_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) that a recipe, read as plain data, must satisfy."""
    tree = copy.deepcopy(schema())
    tree["properties"]["deepspeed"].update(_deepspeed(KEYS))
    _finish(tree)
    tree["properties"][BASE] = {"type": ["string", "null"], "description": "Recipe (name or file) to inherit from."}
    for section in (*tree["$defs"].values(), tree["properties"]["deepspeed"]):
        section["type"] = ["object", "null"]  # a section without keys is null in YAML
    return {
        "$schema": DRAFT,
        **tree,
        "title": "diffmoe recipe",
        "description": "A recipe of diffmoe train --config; all sections and keys are optional.",
    }


def _finish(node: Any) -> None:
    """Drop titles that only repeat the key, and limit each number to the range of its field type."""
    if isinstance(node, list):
        for item in node:
            _finish(item)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("title"), str):  # not the properties of a key that is called "title"
        del node["title"]
    largest = LARGEST.get(node["type"]) if isinstance(node.get("type"), str) else None
    if largest is not None:
        if not {"maximum", "exclusiveMaximum"} & node.keys():
            node["maximum"] = largest
        if not {"minimum", "exclusiveMinimum"} & node.keys():
            node["minimum"] = -largest
    for value in node.values():
        _finish(value)


def _deepspeed(keys: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return the schema of a section of the DeepSpeed JSON."""
    properties = {
        key: _value(rule)
        if isinstance(rule, Value)
        else {"type": "object", **_deepspeed(rule, f"{section}.{key}".lstrip("."))}
        for key, rule in keys.items()
    }
    accepted = dict.fromkeys((*UNSUPPORTED.get(section, ()), *IGNORED.get(section, ())), True)  # if switched off
    return {"properties": {**properties, **accepted}, "additionalProperties": False}


def _value(rule: Value) -> dict[str, Any]:
    plain = copy.deepcopy(rule.schema)
    return {"anyOf": [plain, {"const": AUTO}]} if rule.auto and plain != {"type": "string"} else plain
