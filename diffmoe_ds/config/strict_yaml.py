"""YAML of recipes and ``--set``: plain data only, rejecting duplicate keys and malformed values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from diffmoe_ds.config.fields import MAX_BITS
from diffmoe_ds.control_files import MAX_DEPTH, MAX_YAML_BYTES, read_text

MAX_VALUES = 20_000
"""Most keys and values of a document, in which those behind an alias count each time."""

UNCLEAR = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads in base 8 or 60 (010 is 8, 1:30 is 90), which hardly anybody means."""
KINDS = {"int": f"integer of at most {MAX_BITS} bits", "float": "number", "bool": "boolean"}


class MalformedValueError(yaml.constructor.ConstructorError):
    """A value that looks like a number, date, etc. or is tagged as one, but is invalid."""


def parse_yaml(text: str) -> Any:
    """Parse YAML text into dicts, lists, strings and numbers.

    Raises:
        MalformedValueError: a value that is invalid for its type, such as ``2024-13-45``.
        yaml.YAMLError: other syntax errors, duplicate keys, nesting deeper than `MAX_DEPTH`, and more values than
            `MAX_VALUES`.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}, 0) > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise _too_deep() from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> Any:
    """Read a YAML file as `parse_yaml` does.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large.
        yaml.YAMLError: its contents are invalid.
        ValueError: it is not UTF-8.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def _expanded(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """Return the number of values in a node, those behind aliases each time; `known` holds those of finished nodes."""
    if depth > MAX_DEPTH:  # also ends an alias to a node that contains it
        raise _too_deep()
    if node not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        known[node] = 1 + sum(_expanded(child, known, depth + 1) for child in children)
    return known[node]


def _too_deep() -> yaml.YAMLError:
    return yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which constructs plain data only; stricter about keys and values."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise OverflowError  # no key accepts it, and Python refuses to print very long ones
            if isinstance(value, (int, float)) and isinstance(node.value, str) and UNCLEAR.fullmatch(node.value):
                raise ValueError
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
            # 2024-13-45, 010, 0b_, !!bool x, !!int "", !!timestamp x, a number of 5,000 digits
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
