"""Hostfiles, the variables of Slurm and other launchers, and YAML, made of fragments that look valid."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.strict_yaml import parse_yaml
from diffmoe_ds.distributed.launch import cores_of_rank, first_host, resolve_launch
from diffmoe_ds.errors import ConfigError, DiffMoEError
from tests.helpers.fuzz import fuzz
from tests.helpers.parsers import PARSERS, SLURM, outcome

pytestmark = pytest.mark.usefixtures("hang_limit")
NAMES = (
    *SLURM,
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "TORCHELASTIC_RUN_ID",
)
WORDS = st.sampled_from(
    (
        "",
        "0",
        "1",
        "2",
        "8",
        "-1",
        "²",
        "٣",
        "1\n",
        " 1",
        "1e3",
        "9" * 30,
        "9" * 5000,
        "x",
        "2(x3),1",
        "2(x",
        "(",
        "node[1-2]",
        "[",
        "]",
        "a[",
        "a[]",
        "a[x]",
        ",",
        "a,",
        "-oProxyCommand=x",
        "node1",
        "::1",
        "10.0.0.1",
        "a b",
        "a\0b",
        "\udcff",
        "0.5",
    )
) | st.text(max_size=8)


@fuzz(80)
@given(st.dictionaries(st.sampled_from(NAMES), WORDS, max_size=8), st.booleans())
def test_variables_of_launchers(changes, in_a_step):
    environ = {**SLURM, **changes} if in_a_step else changes
    try:
        launch = resolve_launch(environ)
    except DiffMoEError as error:
        assert len(str(error)) < 1000
        return
    assert 0 <= launch.rank < launch.world <= 2**20 and cores_of_rank(launch, environ) >= 1
    assert launch.master_addr is None or (launch.master_addr.isascii() and launch.master_addr.strip())


@pytest.mark.parametrize(
    "nodes", ("", ",", "[", "]", "a[", "a[]", "a[x]", "a]b", "[[1]]", "a b", "-x", "a\n", "²[1]", "n[٣]")
)
def test_odd_lists_of_nodes_are_refused(nodes):
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST must be a list such as"):
        first_host(nodes)


LINES = st.sampled_from(
    (
        "node1 slots=8",
        "node1",
        "node1 slots=",
        "node1 slots=²",
        "node1 slots=٣",
        "node1 slots=0",
        "-oProxyCommand=id slots=1",
        "node2 slots=" + "9" * 5000,
        "x" * 5000 + " slots=1",
        " " * 5000,
        "a\0b slots=1",
        "# slots",
        "node3\tslots=1 # x",
        "\x0c",
    )
) | st.text(max_size=12)


@fuzz(30)
@given(st.lists(LINES, max_size=5))
def test_hostfiles(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("hosts") / "hostfile"
    path.write_text("\n".join(lines), errors="replace")
    outcome(PARSERS["hostfile"], path)


FRAGMENTS = st.sampled_from(
    (
        "run:",
        "model:",
        "\n",
        " ",
        "  ",
        "- ",
        "? ",
        ": ",
        "&a ",
        "*a",
        "<<: *a",
        "{",
        "}",
        "[",
        "]",
        "!!python/name:os.system ",
        "!!binary x",
        "!!set {a, b}",
        "!!float .inf",
        "0x",
        "1:1:1",
        "1_0",
        "2024-13-45",
        "'",
        '"',
        "|",
        ">",
        "\t",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "#",
        "total_images: ",
        "1e9",
        "~",
        "=",
        "@",
        "`",
        "\u2028",
        "\ufeff",
        "name: ",
        "L-E8",
        "base: ",
    )
)


@fuzz(80)
@given(st.lists(FRAGMENTS, max_size=25).map("".join))
def test_yaml(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(text)
    outcome(PARSERS["recipe"], path)
    with contextlib.suppress(ConfigError):
        load_config("fashion", [f"model.name={text}"])


LEVELS = range(1, 9)
LAUGHS = "\n".join(["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in LEVELS)])
MERGES = "\n".join(["a0: &a0 {b: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in LEVELS)])


@pytest.mark.parametrize(
    ("text", "message"),
    (
        (LAUGHS, "more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        ("a: &a [*a]", "nested more than 32 levels deep"),
        ("a: &a {b: *a}", "nested more than 32 levels deep"),
        ("[" * 5000, "nested more than 32 levels deep"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ("#" * 70_000, "larger than the limit of 65,536 bytes"),
    ),
    ids=("laughs", "merges", "list-in-itself", "mapping-in-itself", "deep", "too-deep", "large"),
)
def test_bombs_in_yaml(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in outcome(PARSERS["recipe"], path)


def test_aliases_of_ordinary_size_are_accepted():
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
