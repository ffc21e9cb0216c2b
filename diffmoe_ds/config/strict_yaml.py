"""YAML of recipes and ``--set``: plain data only, rejecting duplicate keys and malformed values."""

from __future__ import annotations

from typing import Any

import yaml

from diffmoe_ds.config.fields import MAX_BITS

KINDS = {"int": f"integer of at most {MAX_BITS} bits", "float": "number", "bool": "boolean"}


class MalformedValueError(yaml.constructor.ConstructorError):
    """A value that looks like a number, date, etc. or is tagged as one, but is invalid."""


def parse_yaml(text: str) -> Any:
    """Parse YAML text into dicts, lists, strings and numbers.

    Raises:
        MalformedValueError: a value that is invalid for its type, such as ``2024-13-45``.
        yaml.YAMLError: other syntax errors, and duplicate keys.
        RecursionError: deeper nesting than Python can parse.
    """
    return yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which constructs plain data only; stricter about keys and values."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise OverflowError  # no key accepts it, and Python refuses to print very long ones
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
            # 2024-13-45, 0b_, !!bool x, !!int "", !!timestamp x, a number of 5,000 digits
            tag = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} is not a valid {KINDS.get(tag, tag)}; quote it if it is text"
            raise MalformedValueError(None, None, problem, node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map` can tag any node
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.YAMLError(f"duplicate key {key.value!r} in line {key.start_mark.line + 1}")
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)
