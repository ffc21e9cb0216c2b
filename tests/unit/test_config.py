"""Recipes and --set: what is accepted, what is refused, and the error messages."""

from __future__ import annotations

import pytest

from diffmoe_ds.config.load import dump_config, load_config, recipes
from diffmoe_ds.config.presets import NAMES, parse_name
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.planning.parameters import count_parameters


@pytest.mark.parametrize(
    ("name", "kind", "total"),
    (
        ("Dense-L", "dense", "457.84"),
        ("L-E2", "batch_pool", "571.2"),
        ("L-E4", "batch_pool", "772.7"),
        ("L-E8", "batch_pool", "1175.7"),
        ("L-E16", "batch_pool", "1981.7"),
    ),
)
def test_parameter_totals(name, kind, total):
    """Millions, counted on the reference with learned variance."""
    overrides = [f"model.name={name}", f"routing.kind={kind}", "objective.kind=ddpm"]
    counts = count_parameters(load_config("imagenet-256", overrides))
    assert f"{counts.total / 1e6:.{len(total.partition('.')[2])}f}" == total


@pytest.mark.parametrize(
    ("name", "total", "activated"), (("S-E16", 139, 32), ("B-E16", 555, 130), ("L-E8", None, 458), ("L-E16", None, 458))
)
def test_activated_parameters_match_the_paper(name, total, activated):
    """Millions in the paper's tables (eq. 40, C = 1), which leave out routers and capacity predictors."""
    counts = count_parameters(load_config("imagenet-256", [f"model.name={name}"]))
    assert counts.activated / 1e6 == pytest.approx(activated, abs=1)
    if total is not None:
        assert (counts.total - counts.routers) / 1e6 == pytest.approx(total, abs=1)


def test_every_name_parses_and_dense_is_e1():
    assert all(parse_name(name) for name in NAMES)
    assert parse_name("Dense-XL") == parse_name("XL-E1")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_shipped_recipes_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(str(copy)) == config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_sample_grids_of_shipped_recipes_are_cheap(name):
    run, sample = load_config(name).run, load_config(name).sample
    grids = run.total_images // run.sample_every_images
    forwards = grids * sample.num_images * sample.steps * (1 if sample.cfg_scale == 1 else 2)
    assert grids >= 2 and forwards < 0.05 * 3 * run.total_images, "a training step costs about three forward passes"


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("model.nam=x", "model.nam: 'nam' is not known; did you mean 'name'?"),
        ("modle.name=x", "'modle' is not known; did you mean 'model'?"),
        ("model.name=s-e16", "model.name: 's-e16' is not known; did you mean 'S-E16'?"),
        ("model.name=M-E8", "--set: model.name: 'M-E8' is not known; did you mean"),
        ("model.name=S-E3", "model.name: 'S-E3' is not known; did you mean 'S-E"),
        ("routing.kind=batchpool", "routing.kind: 'batchpool' is not known; did you mean 'batch_pool'?"),
        ("routing.pool=node", "routing.pool: 'node' is not known; "),
        ("routing.capacity=9", "routing.capacity must not exceed the number of experts (8), got 9.0"),
        ("routing.capacity=0", "routing.capacity must be positive, got 0"),
        ("model.patch_size=5", "model.patch_size must divide model.input_size (32), got 5"),
        ("run.total_images=many", "run.total_images must be an integer, got 'many'"),
        ("run.total_images=1.5", "run.total_images must be an integer, got 1.5"),
        ("run.total_images=.inf", "run.total_images must be an integer, got inf"),
        ("run.total_images=-5", "run.total_images must be positive, got -5"),
        ("run.total_images=1e-5", "run.total_images must be an integer, got '1e-5'"),
        ("run.total_images=1e300", "run.total_images must be an integer of at most 64 bits, got '1e300'"),
        ("run.total_images=true", "run.total_images must be an integer, got True"),
        ("data.path=2024-13-45", "--set data.path: '2024-13-45' is not a valid timestamp; quote it if it is text"),
        ("data.path=!!timestamp x", "--set data.path: 'x' is not a valid timestamp"),
        ("run.seed=0b_", "--set run.seed: '0b_' is not a valid integer of at most 64 bits"),
        ("run.seed=0x_", "--set run.seed: '0x_' is not a valid integer"),
        ("run.seed=!!int abc", "--set run.seed: 'abc' is not a valid integer"),
        ("run.seed=!!int ''", "--set run.seed: '' is not a valid integer"),
        (f"run.seed={'9' * 5000}", f"--set run.seed: '{'9' * 40}' is not a valid integer"),
        (f"run.seed=0x{'f' * 5000}", "--set run.seed: '0xfff"),
        ("data.horizontal_flip=!!bool x", "--set data.horizontal_flip: 'x' is not a valid boolean"),
        ("optimizer.lr=!!float x", "--set optimizer.lr: 'x' is not a valid number"),
        ("model=!!map x", "model must be a section with keys, got '!!map x'"),
        (f"optimizer.lr={'9' * 400}", "--set optimizer.lr: '999"),
        ("run.seed=-1", "run.seed must be at least 0 and less than 2^64, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr must be a finite number, got nan"),
        ("eval.metrics=[fid]", "eval.metrics[0]: 'fid' is not known; did you mean 'kid'?"),
        ("eval.metrics=kid", "eval.metrics must be a list of names, got 'kid'"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be a list of 2 numbers, got [0.9]"),
        ("ema.decay=1", "ema.decay must be at least 0 and less than 1, got 1"),
        ("model=5", "model must be a section with keys, got 5"),
        ("run=null", "--set run=null: run is a section; set its keys, as in run.total_images=..."),
        ("model.name.x=5", "'name' is a value, not a section"),
        ("seed", "--set must have the form section.key=value, got 'seed'"),
        ("model.activation_checkpointing=2", "model.activation_checkpointing must be true or false, got 2"),
        ("model.num_heads=5", "model.hidden_size must be divisible by 4 and by model.num_heads (5), got 128"),
    ),
)
def test_wrong_recipe_values_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("fashion", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_routers_have_short_names():
    for name, kind in (("tc", "token_choice"), ("ec", "expert_choice"), ("diffmoe", "batch_pool")):
        assert load_config("fashion", [f"routing.kind={name}"]) == load_config("fashion", [f"routing.kind={kind}"])


def test_numbers_in_scientific_notation_are_numbers():
    assert load_config("fashion", ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4
    assert load_config("fashion", ["run.total_images=2.0e+3"]).run.total_images == 2000
    assert load_config("fashion", ["run.total_images=1e5"]).run.total_images == 100_000
    assert type(load_config("fashion", ["run.total_images=1e5"]).run.total_images) is int


@pytest.mark.parametrize("value", ("2024-13-45", "0b_", "!!bool x", "!!timestamp x", "9" * 5000, "!!map x", "[0x_]"))
def test_an_invalid_value_is_named_with_its_file_and_line(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run:\n  seed: {value}\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: invalid YAML: ") and "line 2" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_empty_section_is_a_section_without_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\nmodel:\ndeepspeed:\n")
    config = load_config(str(path), ["run.total_images=5"])
    assert config.run.total_images == 5 and config.deepspeed == {}


def test_a_recipe_inherits_from_another(tmp_path):
    """Sections are merged, lists and values replaced; files are relative to the recipe that names them."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(
        "base: fashion\nrun: {total_images: 64}\noptimizer: {betas: [0.5, 0.6]}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: mine/small.yaml\nrun: {seed: 5}\ndata:\ndeepspeed: {train_batch_size: 8}\n")
    found = load_config(str(child), ["ema.decay=0.5"])
    expected = load_config(
        "fashion",
        [
            "run.total_images=64",
            "run.seed=5",
            "optimizer.betas=[0.5,0.6]",
            "ema.decay=0.5",
            "deepspeed.train_batch_size=8",
        ],
    )
    assert found == expected and found.deepspeed["optimizer"]["type"] == "AdamW"
    assert load_config(str(child)).ema.decay == load_config("fashion").ema.decay


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("base: fashon", "recipe.yaml: base: 'fashon' is not known; did you mean 'fashion'?"),
        ("base: [fashion]", "recipe.yaml: base must be the name or the path of a recipe, got ['fashion']"),
        ("base:", "recipe.yaml: base must be the name or the path of a recipe, got nothing."),
        ("base: missing.yaml", "recipe.yaml: base missing.yaml: the file does not exist; `diffmoe init IMAGES` writes"),
        ("base: recipe.yaml", "recipe.yaml: base: recipe.yaml inherits from this recipe"),
        ("base: other.yaml", "other.yaml: base: ./recipe.yaml inherits from this recipe"),
    ),
)
def test_wrong_bases_are_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: ./recipe.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "recipe.yaml"))
    assert message in str(error.value)


def test_an_error_names_set_only_if_its_key_was_set_there(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {seed: -1}")
    for overrides, start in (
        (["run.seed=-2"], "--set: run.seed"), (["run.seed=[1]"], "--set: run.seed"), (["model.depth=0"], "--set: "),
        (["run.total_images=5"], f"{path}: run.seed"),
        (["run.seed=0", "model.num_heads=7"], f"{path} with --set: model.hidden_size"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            load_config(str(path), overrides)
        assert str(error.value).startswith(start)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="'fashon' is not known; did you mean 'fashion'"):
        load_config("fashon")
    with pytest.raises(ConfigError, match=r"--config \./fashion: the file does not exist; .* names: .*fashion"):
        load_config("./fashion")
