"""`diffmoe config`, the JSON schema of recipes, and the generated page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from diffmoe_ds.cli import main
from diffmoe_ds.config.deepspeed_keys import check_keys
from diffmoe_ds.config.document import REGENERATE, as_yaml, markdown
from diffmoe_ds.config.json_schema import recipe_schema
from diffmoe_ds.config.load import config_from_dict, config_to_dict, load_config, recipes
from diffmoe_ds.config.reference import sections
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
KEYS = [key for section in sections().values() for key in section.keys]
WRONG = {
    "positive": (0, -1),
    "non-negative": (-1, -0.5),
    "at least 1": (0.999, -1),
    "at least 0 and less than 1": (-0.1, 1, 1.5),
    "at least 0 and less than 2^64": (-1, 2**64),
    "positive and at most 3e+38": (0, 4e38),
    "positive and at most 512": (0, 513),
    "positive and at most 65536": (0, 65_537),
    "positive and at most 100000": (0, 100_001),
    "positive and at most 1e+06": (0, 1_000_001),
    "positive and at most 1e+07": (0, 10_000_001),
    "positive and at most 1e+09": (0, 1_000_000_001),
    "at least 0 and at most 1024": (-1, 1_025),
    "at least 1 and at most 1e+07": (0, 10_000_001),
    "each one of frechet, kid, inception_score, precision or recall": (["fid"], ["frechet", 1], [["kid"]], "kid"),
    "each at least 0 and less than 1": ([0.5, 1.0], [-0.1, 0.5], [0.5], [0.5, 0.5, 0.5], ["x", 0.5]),
}


def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


VALIDATOR = validator()


def as_editors_read(text: str):
    """YAML 1.2, which editors use, reads 1e5 as a number."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return yaml.load(text, Loader)


def accepted(tree: dict) -> bool:
    """Whether `load_config` accepts a recipe's content, the DeepSpeed keys included."""
    try:
        check_keys(config_from_dict(tree, "recipe").deepspeed, "recipe")
    except ConfigError:
        return False
    return True


def tree_of(name: str, value: object) -> dict:
    section, _, key = name.partition(".")
    return {section: {key: value}}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["config", *arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_every_field_is_documented():
    assert {f"{name}.{key}" for name in config_to_dict(Config()) for key in config_to_dict(Config())[name]} == {
        key.name for key in KEYS
    }
    for section in sections().values():
        assert section.meaning.endswith("."), section.name
    for key in KEYS:
        assert len(key.meaning) > 15 and key.meaning.endswith("."), f"{key.name} needs a docstring ending in a period"
        assert "|" not in key.meaning, f"{key.name}: the page's tables are separated by |"


@pytest.mark.parametrize("name", sorted(recipes()))
def test_shipped_recipes_satisfy_the_schema(name):
    VALIDATOR.validate(as_editors_read(recipes()[name].read_text()))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_the_schema_refuses_what_load_config_refuses(key):
    """For every key: its default, and values of wrong types or out of range."""
    values = [key.default, None, True, "?", 1, 0, 0.5, 2**64, -(2**64), [], [0.5, 0.5], {}, {"a": 1}, *key.choices]
    values += WRONG[key.range] if key.range else ()
    for value in values:
        tree = tree_of(key.name, value)
        expected = accepted(tree) if key.name not in ACROSS else accepted_alone(key.name, value)
        assert VALIDATOR.is_valid(tree) == expected, f"{key.name}: {value!r}"
    section, _, short = key.name.partition(".")
    typo = {section: {f"{short}x": key.default}}
    assert not VALIDATOR.is_valid(typo) and not accepted(typo)


ACROSS = {
    "model.hidden_size", "model.num_heads", "model.input_size", "model.patch_size", "model.mlp_ratio",
    "routing.capacity", "routing.kind", "model.depth", "routing.num_experts", "model.name",
    "model.mlp", "routing.unconditional_expert", "routing.bias_rate", "routing.groups", "routing.groups_kept",
    "model.text_encoders", "data.text_encoder", "data.captions", "sample.prompts",
}  # fmt: skip
"""Keys with checks across keys, which a JSON schema cannot express."""


def accepted_alone(name: str, value: object) -> bool:
    """Whether a value is valid for its key, whatever the other keys say."""
    section, _, key = name.partition(".")
    try:
        type(getattr(Config(), section)).model_validate({key: value})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "tree",
    (
        {}, {"run": None}, {"deepspeed": None}, {"runs": {}}, {"run": 5}, {"run": []}, {"deepspeed": []},
        {"deepspeed": {"train_batch_size": 8}}, {"deepspeed": {"train_batch_size": "auto"}},
        {"deepspeed": {"train_batch_sise": 8}}, {"deepspeed": {"train_batch_size": 0}},
        {"deepspeed": {"train_batch_size": 2**31}}, {"deepspeed": {"train_batch_size": "8"}},
        {"deepspeed": {"zero_optimization": {"stage": 3}}}, {"deepspeed": {"zero_optimization": {"stage": 4}}},
        {"deepspeed": {"zero_optimization": {"stage": "auto"}}}, {"deepspeed": {"zero_optimization": "auto"}},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
        {"deepspeed": {"optimizer": {"params": {"lr": "auto", "betas": [0.9, 0.95]}}}},
        {"deepspeed": {"optimizer": {"params": {"betas": [0.9, 1]}}}},
        {"deepspeed": {"optimizer": {"params": {"learning_rate": 1}}}},
        {"deepspeed": {"bf16": {"enabled": "yes"}}}, {"deepspeed": {"bf16": {"enabled": "auto"}}},
        {"deepspeed": {"comms_logger": "auto"}}, {"deepspeed": {"log_level": "loud"}}, {"deepspeed": {"pipeline": {}}},
        {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}}}, {"deepspeed": {"gradient_clipping": -1}},
    ),
)  # fmt: skip
def test_the_schema_agrees_about_sections_and_deepspeed_keys(tree):
    assert VALIDATOR.is_valid(tree) == accepted(tree)


def test_the_schema_documents_every_key_for_editors():
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for section, entry in schema["properties"].items():
        assert "$ref" in entry or entry["description"]
        if "$ref" in entry:
            assert schema["$defs"][entry["$ref"].rpartition("/")[2]]["description"]
            fields = schema["$defs"][entry["$ref"].rpartition("/")[2]]["properties"]
            assert list(fields) == [key.name.partition(".")[2] for key in sections()[section].keys]
            assert all(field["description"] and "default" in field for field in fields.values())


def test_json_schema_option_prints_the_schema(capsys):
    code, out, _ = run(capsys, "--json-schema")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(recipe_schema()))


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page.rstrip() == markdown().rstrip(), f"docs/configuration.md is stale; run `make docs` or `{REGENERATE}`"


def test_markdown_option_prints_the_page(capsys):
    code, out, _ = run(capsys, "--markdown")
    assert code == 0 and out.rstrip() == markdown().rstrip()


def test_the_page_has_every_key_with_its_default():
    page = markdown()
    for section in sections().values():
        part = page.split(f"\n## {section.name}\n")[1].split("\n## ")[0]
        for key in section.keys:
            row = re.search(rf"^\| `{key.name.partition('.')[2]}` \| .* \|$", part, re.MULTILINE)
            assert row and f"| `{as_yaml(key.default)}` | {key.meaning} |" in row[0], key.name
            assert all(f"`{choice}`" in row[0] for choice in key.choices[:10] if key.name != "model.name")


@pytest.mark.parametrize("section", sections().values(), ids=lambda section: section.name)
def test_a_section_is_listed(capsys, section):
    code, out, _ = run(capsys, section.name)
    assert code == 0 and out.startswith(f"{section.name}: ")
    text = " ".join(out.split())
    for key in section.keys:
        assert f" {key.name}: " in text and f"; default {as_yaml(key.default)} {key.meaning}" in text
    if section.name == "deepspeed":
        assert " zero_optimization.stage: 0, 1, 2 or 3" in text and ' bf16.enabled: true, false or "auto"' in text
    assert max(map(len, out.splitlines())) <= 120


def test_all_sections_are_listed_without_arguments(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(f"\n  {key.name}: " in out for key in KEYS)


def test_one_key_is_shown_alone(capsys):
    code, out, _ = run(capsys, "routing.kind")
    kinds = "routing.kind: dense | token_choice | expert_choice | batch_pool | expert_race; default batch_pool"
    assert code == 0 and kinds in " ".join(out.split())
    assert "routing.pool:" not in out
    assert "run.seed: integer, at least 0 and less than 2^64; default 0" in run(capsys, "run.seed")[1]
    assert "run.total_images: positive integer; default 100000" in run(capsys, "run")[1]


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_is_shown_as_yaml_with_marks(capsys, tmp_path, name):
    code, out, _ = run(capsys, "--recipe", name)
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert code == 0 and load_config(str(path)) == load_config(name), "the output is itself a recipe"
    values = config_to_dict(load_config(name))
    for key in KEYS:
        section, _, short = key.name.partition(".")
        part = out.split(f"{section}:\n")[1].split("\n" + "deepspeed:")[0] if section != "deepspeed" else out
        line = next(line for line in part.splitlines() if line.startswith(f"  {short}: "))
        differs = values[section][short] != key.default
        assert (f"# default: {as_yaml(key.default)}" in line) == differs, line


def test_a_recipe_section_and_key(capsys):
    assert run(capsys, "data", "--recipe", "imagenet-256")[1].startswith("data:\n  path: latents  # default: null\n")
    assert run(capsys, "model.name", "--recipe", "imagenet-256")[1] == "model:\n  name: L-E8  # default: tiny-E8\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["routng"], "section: 'routng' is not known; did you mean 'routing'?"),
        (["routing.knd"], "key: 'routing.knd' is not known; did you mean 'routing.kind'?"),
        (["seed"], "'seed' is the name of a key, not of a section; try run.seed."),
        (["kind"], "'kind' is the name of a key, not of a section; try routing.kind or objective.kind."),
        (["deepspeed.zero"], "'deepspeed.zero' is not a key; see diffmoe config deepspeed."),
        (["--recipe", "fashon"], "'fashon' is not known; did you mean 'fashion'?"),
        (["run", "--json-schema"], "--json-schema prints all sections; remove 'run'."),
        (["run", "--markdown"], "--markdown prints all sections; remove 'run'."),
    ),
)
def test_wrong_arguments_give_a_one_sentence_error(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", ([], ["--recipe", "fashion"], ["--json-schema"]), ids=str)
def test_it_runs_without_torch(arguments):
    """The command does not import torch, so it answers in tenths of a second."""
    code = (
        f"import sys\nfrom diffmoe_ds.cli import main\nassert main({['config', *arguments]}) == 0\n"
        "print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\n[]\n"), done.stdout[-200:] + done.stderr


def test_output_to_a_closed_pipe_gives_no_traceback():
    code = "import sys\nfrom diffmoe_ds.cli import main\nsys.exit(main(['config', '--json-schema']))"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -1', shell=True, capture_output=True, text=True)
    assert done.stdout == "{\n" and "Error" not in done.stderr
