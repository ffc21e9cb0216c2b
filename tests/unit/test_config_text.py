"""Any text in a recipe or ``--set`` is read or refused with one sentence; old configurations load unchanged."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.config.load import config_from_dict, config_to_dict, dump_config, load_config
from diffmoe_ds.config.reference import sections
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

KEYS = [key.name for section in sections().values() for key in section.keys]
TEXT = st.text(st.sampled_from("0123456789abex_.-+:!&*{}[],'\"#|>%@~ \n\t\u00fc"), max_size=12) | st.text(max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)

CONFIG_OF_7D693E9 = """
model: {name: tiny-E8, init_from: null, hidden_size: null, depth: null, num_heads: null, input_size: 32,
  in_channels: 1, patch_size: 4, num_classes: 10, label_dropout: 0.1, mlp_ratio: 2.0, mlp: gelu,
  activation_checkpointing: false}
routing: {kind: batch_pool, pool: world, num_experts: null, capacity: 1.0, interleave: true, shared_experts: 0,
  capacity_predictor: true, capacity_weight: 1.0, balance_weight: 0.01, threshold_decay: 0.95}
objective: {kind: flow, flow_time_scale: 1000.0}
data: {path: null, horizontal_flip: true, num_workers: 1, shuffle: whole, shuffle_window: 16384, vae: null,
  cache_dir: null, cache_gb: 100.0}
optimizer: {lr: 0.003, betas: [0.9, 0.99], eps: 1.0e-08, weight_decay: 0.0}
ema: {decay: 0.99}
run: {total_images: 30000, seed: 0, save_every_images: 0, log_every_images: 2000, sample_every_images: 10000,
  start_timeout_s: 300.0, straggler_steps: 100, straggler_ratio: 1.5, nonfinite_skips: 0, rank_timeout_s: 300.0}
checkpoint: {keep_last: 3, keep_every_images: 0, async_save: true, on_error: stop}
sample: {num_images: 20, steps: 12, sampler: null, cfg_scale: 2.0}
expert_parallel: {autoep_size: null}
deepspeed: {train_batch_size: 32}
"""


@given(key=st.sampled_from(KEYS) | TEXT, value=TEXT)
def test_every_override_is_read_or_refused_in_one_line(key, value):
    try:
        config = load_config("fashion", [f"{key}={value}"])
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
    else:
        assert config_from_dict(yaml.safe_load(dump_config(config)), "again") == config


@given(text=TEXT)
def test_every_recipe_is_read_or_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(f"run:\n  seed: {text}\n", encoding="utf-8", errors="ignore")
    try:
        load_config(str(path))
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))


@given(key=st.sampled_from(KEYS), value=PLAIN)
def test_every_plain_value_is_accepted_or_refused_with_its_key(key, value):
    section, _, name = key.partition(".")
    try:
        config_from_dict({section: {name: value}}, "checkpoint")
    except ConfigError as error:
        assert str(error).startswith("checkpoint: ") and section in str(error) and "\n" not in str(error)


@given(seed=st.integers(0, 2**64 - 1), lr=st.floats(1e-30, 3e38), decay=st.floats(0, 1, exclude_max=True))
def test_numbers_survive_a_round_trip_through_set_and_yaml(seed, lr, decay):
    config = load_config("fashion", [f"run.seed={seed}", f"optimizer.lr={lr!r}", f"ema.decay={decay!r}"])
    assert (config.run.seed, config.optimizer.lr, config.ema.decay) == (seed, lr, decay)
    assert config_from_dict(yaml.safe_load(dump_config(config)), "again") == config


def test_a_deeply_nested_value_is_shortened_in_the_message():
    tree = yaml.safe_load("&a [1, 2]")
    for _ in range(40):
        tree = [tree] * 9
    with pytest.raises(ConfigError, match=r"run\.seed must be an integer, got \[\[") as caught:
        config_from_dict({"run": {"seed": tree}}, "recipe")
    assert len(str(caught.value)) < 500


def test_configurations_that_older_versions_stored_load_unchanged():
    """As `meta.json` and `resolved.yaml` of commit 7d693e9 hold them: every key, in the same order.

    Sections and keys that are newer have their defaults.
    """
    stored = yaml.safe_load(CONFIG_OF_7D693E9)
    loaded, defaults = config_to_dict(config_from_dict(stored, "meta.json")), config_to_dict(Config())
    assert [name for name in loaded if name in stored] == list(stored)
    assert all(section == defaults[name] for name, section in loaded.items() if name not in stored)
    for name, section in ((name, loaded[name]) for name in stored):
        newer = section.keys() - stored[name].keys()
        assert {key: value for key, value in section.items() if key not in newer} == stored[name]
        assert [key for key in section if key not in newer] == list(stored[name])
        assert all(section[key] == defaults[name][key] for key in newer)


@pytest.mark.parametrize("recipe", ("false", "0", "[]", '""'))
def test_a_recipe_that_is_not_a_mapping_is_refused(tmp_path, recipe):
    """A value that Python takes for false is not an empty file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ConfigError, match="a recipe must be a mapping of sections"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("run.seed=010", "'010' is not a valid integer"),
        ("run.save_every_minutes=1:30", "'1:30' is not a valid integer"),
        ("run.rank_timeout_s=1:30.5", "'1:30.5' is not a valid number"),
        ('run.seed="\u0663"', "run.seed must be an integer"),
        ('run.seed=" 1 "', "run.seed must be an integer"),
        ('optimizer.lr="\u0663"', "optimizer.lr must be a number"),
        ('model.num_classes="\u0663"', "model.num_classes must be "),
        ('run.profile_steps="\u0663-\u0664"', "run.profile_steps must be a step"),
        ("model.name=L-E\u0668", "model.name: 'L-E\u0668' is not known"),
        ("model.name=L-E08", "model.name: 'L-E08' is not known"),
    ),
)
def test_numbers_that_could_mean_something_else_are_refused(override, message):
    """YAML 1.1 reads 010 as 8 and 1:30 as 90; Python takes digits of any script."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("fashion", [override])


def test_large_integers_in_quotes_are_exact():
    assert load_config("fashion", ['run.seed="9007199254740993"']).run.seed == 9007199254740993
