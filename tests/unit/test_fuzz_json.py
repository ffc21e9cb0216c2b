"""Every parser of JSON and YAML, on valid files of which values are replaced, removed, renamed or added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fuzz import changed_trees, fuzz, to_json
from tests.helpers.parsers import changing

pytestmark = pytest.mark.usefixtures("hang_limit")


def signed(part: str) -> Callable[[Any], Any]:
    """Return what renews the checksum of a part of a tree, as an attacker would."""

    def sign(tree: Any) -> Any:
        if isinstance(tree, dict) and part in tree:
            tree["sha256"] = hashlib.sha256(json.dumps(tree[part], sort_keys=True).encode()).hexdigest()
        return tree

    return sign


SIGNED = {"manifest": signed("files"), "capacity": signed("calibration")}
FORMATS = (
    "manifest",
    "metadata",
    "model-config",
    "deepspeed",
    "index",
    "latents",
    "settings",
    "record",
    "images-manifest",
    "capacity",
    "vae",
)


@pytest.mark.parametrize("name", FORMATS)
@fuzz(15)
@given(data=st.data())
def test_changed_json(name, data):
    with changing(name) as path:
        tree = data.draw(changed_trees(json.loads(path.read_text())))
        path.write_text(to_json(SIGNED.get(name, lambda same: same)(tree)))


@pytest.mark.parametrize("name", ("recipe", "reference-yaml"))
@fuzz(15)
@given(data=st.data())
def test_changed_yaml(name, data):
    with changing(name) as path:
        tree = data.draw(changed_trees(yaml.safe_load(path.read_text())))
        path.write_text(yaml.safe_dump(tree).replace("<raw>", ""), errors="replace")


@pytest.mark.parametrize("name", ("metrics", "validation"))
@fuzz(15)
@given(data=st.data())
def test_changed_lines(name, data):
    with changing(name) as path:
        first, *others = path.read_text().splitlines(keepends=True)
        path.write_text(to_json(data.draw(changed_trees(json.loads(first)))) + "\n" + "".join(others))
