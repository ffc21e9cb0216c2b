"""``meta.json``: round trips, files of older versions, and one-sentence errors for damaged files."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffmoe_ds.checkpoint.layout import META
from diffmoe_ds.checkpoint.metadata import (
    CheckpointMetadata,
    SavedLayout,
    ScheduledValues,
    parse_metadata,
    read_manifest,
    read_metadata,
    write_manifest,
)
from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Digest, write_json

BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that other jobs use at the same time."""
COUNTS = st.integers(0, 10**15)
SIZES = st.integers(0, 2**63 - 1)
NUMBERS = st.floats(0, 3e38)  # whatever learning rate a run accepts
FINITE = {"allow_nan": False, "allow_infinity": False}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(**FINITE) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
SHAPES = st.lists(st.integers(0, 2**20), max_size=3).map(tuple)
DIGESTS = st.builds(Digest, SIZES, st.from_regex("[0-9a-f]{64}", fullmatch=True))
METADATA = st.builds(
    CheckpointMetadata,
    files=COUNTS,
    images=st.integers(10**14, 10**15),
    step=st.integers(0, 10**14),
    adam_step=st.integers(0, 10**14),
    shapes=st.dictionaries(st.text(max_size=8), SHAPES, max_size=3),
    config=st.sampled_from([Config(), load_config("fashion"), load_config("imagenet-256")]),
    lr_now=st.builds(ScheduledValues, lr=NUMBERS, betas=st.tuples(NUMBERS, NUMBERS)),
    layout=st.builds(SavedLayout, *[st.none() | COUNTS] * 6),
    lr_scheduler=st.none() | OBJECTS,
    began_from=st.none() | st.text(max_size=5),
    deepspeed=st.none() | OBJECTS,
    class_names=st.none() | st.lists(st.text(max_size=5), max_size=3).map(tuple),
)
TREE = CheckpointMetadata(
    files=2, images=640, step=20, adam_step=19, shapes={"w": (4, 2), "b": ()}, config=Config(),
    lr_now=ScheduledValues(3e-3, (0.9, 0.99)), layout=SavedLayout(2, 2, 1, 32, 16, 1), lr_scheduler={"step": 3},
    began_from="/old", deepspeed={"gradient_clipping": 1.0}, class_names=("cat", "dog"),
).to_json()  # fmt: skip
REQUIRED = ("format", "files", "images", "step", "adam_step", "shapes", "config", "lr_now", "layout")
OPTIONAL = ("lr_scheduler", "began_from", "deepspeed", "class_names")
NESTED = (("lr_now", "lr"), ("lr_now", "betas"), ("shapes", "w"), *[("layout", key) for key in TREE["layout"]])


@BUSY
@given(METADATA)
def test_what_is_written_is_read_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("checkpoint")
    write_json(path / META, metadata.to_json())
    assert read_metadata(path) == metadata


def test_every_key_of_the_file_is_tested():
    assert {*REQUIRED, *OPTIONAL} == TREE.keys()


def test_the_format_is_the_one_that_older_versions_write_and_read():
    """Key for key, so that files stay compatible in both directions."""
    assert TREE["format"] == 1 and TREE["shapes"] == {"w": [4, 2], "b": []}
    assert TREE["lr_now"] == {"lr": 3e-3, "betas": [0.9, 0.99]}
    assert TREE["layout"] == {
        "world": 2, "ep_size": 2, "zero_stage": 1, "global_batch": 32, "micro_batch": 16, "accumulation": 1,
    }  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_gives_a_one_sentence_error(key):
    tree = {name: value for name, value in TREE.items() if name != key}
    with pytest.raises(CheckpointError, match=rf"^meta\.json: (has )?{key} (is )?None, but"):
        parse_metadata(tree, META)


def test_keys_that_old_checkpoints_lack_have_defaults():
    """No scheduler, not started from another run, DeepSpeed settings and parts of the layout unknown."""
    tree = {name: value for name, value in TREE.items() if name not in OPTIONAL}
    tree["layout"] = {"world": 2, "ep_size": 1, "zero_stage": 1, "global_batch": 32}
    found = parse_metadata({**tree, "from_a_later_version": [1]}, META)
    assert (found.lr_scheduler, found.began_from, found.deepspeed) == (None, None, None)
    assert found.layout == SavedLayout(2, 1, 1, 32) and "micro_batch" not in found.to_json()["layout"]
    assert found.class_names is None and not {"deepspeed", "class_names"} & found.to_json().keys()


@settings(max_examples=300)
@example(key=("shapes",), value={"\n": None})
@given(key=st.sampled_from([(key,) for key in TREE] + list(NESTED)), value=JSON | st.just(float("nan")))
def test_any_value_is_read_or_refused_by_name(key, value):
    tree = copy.deepcopy(TREE)
    inner = tree
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = value
    try:
        found = parse_metadata(json.loads(json.dumps(tree)), META)
    except CheckpointError as error:
        message = str(error)
        assert message.startswith("meta.json: ") and "\n" not in message
        assert key[-1] in message or key == ("config",)  # which names the key inside it
    else:
        assert parse_metadata(found.to_json(), META) == found


@given(JSON)
def test_any_other_file_is_refused(tree):
    with pytest.raises(CheckpointError, match=r"^meta\.json: has format .*, but this version reads 1"):
        parse_metadata(tree, META)


@pytest.mark.parametrize("key", ("files", "images", "step", "adam_step", "world", "last_batch_iteration"))
@pytest.mark.parametrize("value", (2**63 - 1, 10**15 + 1, 641))
def test_numbers_that_a_resumed_run_could_not_save_are_refused(key, value):
    """A run adds to them; 64 bits would overflow, and no version could read the checkpoint that it saves."""
    tree = copy.deepcopy(TREE)
    inner = {"world": tree["layout"], "last_batch_iteration": tree["lr_scheduler"]}.get(key, tree)
    inner[key] = value
    if value == 641 and key not in ("step", "adam_step"):
        assert parse_metadata(tree, META).to_json() == tree
        return
    most = "640" if "step" in key else "1,000,000,000,000,000"
    with pytest.raises(
        CheckpointError, match=rf"{key} is {value}, but it must be a whole number from -?[01] to {most}\.$"
    ):
        parse_metadata(tree, META)


def test_a_newer_format_says_what_to_do():
    with pytest.raises(
        CheckpointError, match=r"^meta\.json: has format 2, but this version reads 1; update diffmoe_ds\.$"
    ):
        parse_metadata({**TREE, "format": 2}, META)


@pytest.mark.parametrize("text", ("", "{", "[" * 100_000, '{"format": 1e999}', "\udc80"))
def test_a_file_that_is_not_json_gives_a_one_sentence_error(tmp_path, text):
    (tmp_path / META).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"meta\.json: (cannot be read|has format)"):
        read_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"none/meta\.json: cannot be read"):
        read_metadata(tmp_path / "none")


@BUSY
@given(files=st.dictionaries(st.from_regex(r"[a-z]{1,8}\.json", fullmatch=True), DIGESTS))
def test_manifests_are_read_back(tmp_path_factory, files):
    path = tmp_path_factory.mktemp("checkpoint")
    files = {**files, META: Digest(1, "0" * 64)}
    write_manifest(path, files)
    assert read_manifest(path) == files


def test_the_optimizer_is_adamw_unless_a_supported_one_is_recorded():
    for recorded in ({}, {"optimizer": []}, {"optimizer": {"type": []}}, {"optimizer": {"type": "Adan"}}):
        assert parse_metadata({**TREE, "deepspeed": recorded}, META).optimizer == "AdamW"
    assert parse_metadata({**TREE, "deepspeed": {"optimizer": {"type": "Lion"}}}, META).optimizer == "Lion"
