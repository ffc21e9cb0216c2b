"""Strategies that turn valid files into hostile ones, for hypothesis."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("DIFFMOE_FUZZ_EXAMPLES", "0"))
"""Examples of each test in a long run; 0 in a short one, which tries the same few examples every time."""


def fuzz(short: int) -> settings:
    """Return the settings of a test that tries `short` examples by default."""
    return settings(
        max_examples=EXAMPLES or short, derandomize=not EXAMPLES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


RAW = ("1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "-0", "1E400", "[" * 3000 + "]" * 3000, "[" * 99 + "]" * 99)
"""JSON that `json.dumps` does not write."""
VALUES = (
    None, True, False, -1, 0, 1, 3, 0.5, -0.5, 1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18,
    "", "x", "1", "-1", "²", "٣", "../../etc/passwd", "/", ".", "..", "a\0b", "\ud800", "\n", "x" * 5000,
    [], {}, [[]], [{}], {"": {}}, [1e308] * 3, [-1], ["x"], {"bytes": 1}, [None] * 100,
)  # fmt: skip
RAW_VALUE = st.sampled_from(RAW).map(lambda text: f"<raw>{text}")
VALUE = st.sampled_from(VALUES).map(copy.deepcopy) | RAW_VALUE | st.integers() | st.text(max_size=9)


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a tree but the root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in pairs for path in ((*prefix, key), *paths(value, (*prefix, key)))]


@st.composite
def changed_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Return a tree of which a few values are replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = paths(tree)
        if not found:
            return draw(VALUE)
        *parents, last = draw(st.sampled_from(found))
        node = tree
        for key in parents:
            node = node[key]
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add")))
        if action == "replace":
            node[last] = draw(VALUE)
        elif action == "add" and isinstance(node, list):
            node.append(draw(VALUE))
        elif action == "add":
            node[draw(st.text(max_size=5))] = draw(VALUE)
        elif action == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(("", "x", "a\0b", "../x", str(last).upper())))] = node.pop(last)
        else:
            del node[last]
    return tree


def to_json(tree: Any) -> str:
    """Return a tree as JSON, in which strings that begin with ``<raw>`` are written as they are."""
    if isinstance(tree, str) and tree.startswith("<raw>"):
        return tree.removeprefix("<raw>")
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(to_json, tree)) + "]"
    return json.dumps(tree)


PIECES = st.sampled_from(
    (b"\0", b"\xff" * 8, b"[" * 2000, b"{", b'"', b"\x80", b"9" * 400, b"\n", b"\r", b"\xef\xbb\xbf", b"")
)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return data of which a few parts are overwritten, removed, repeated or added."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 2, 4, 8, 100, 10_000))))
        piece = draw(PIECES | st.binary(max_size=9))
        action = draw(st.sampled_from(("overwrite", "insert", "remove", "repeat", "truncate")))
        if action == "overwrite":
            data = data[:start] + piece + data[start + len(piece) :]
        elif action == "insert":
            data = data[:start] + piece + data[start:]
        elif action == "remove":
            data = data[:start] + data[end:]
        elif action == "repeat":
            data = data[:end] + data[start:end] * draw(st.integers(1, 9)) + data[end:]
        else:
            data = data[:start]
    return data
