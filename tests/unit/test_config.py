"""Recipes, --set and the DeepSpeed JSON: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffmoe_ds.config.deepspeed import read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.load import dump_config, load_config, recipes
from diffmoe_ds.config.presets import NAMES, parse_name
from diffmoe_ds.errors import ConfigError, TopologyError
from diffmoe_ds.planning.parameters import count_parameters

SHIPPED = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))


def resolve(raw: dict, *overrides: str, world: int = 1, local_world: int | None = None, device: str = "cpu"):
    config = load_config("fashion", overrides)
    return resolve_deepspeed(raw, config, "ds.json", world=world, local_world=local_world or world, device=device)


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
def test_activated_parameters_are_the_papers(name, total, activated):
    """Millions in the paper's tables (eq. 40, C = 1), which leave out routers and capacity predictors."""
    counts = count_parameters(load_config("imagenet-256", [f"model.name={name}"]))
    assert counts.activated / 1e6 == pytest.approx(activated, abs=1)
    if total is not None:
        assert (counts.total - counts.routers) / 1e6 == pytest.approx(total, abs=1)


def test_every_name_parses_and_dense_is_e1():
    assert all(parse_name(name) for name in NAMES)
    assert parse_name("Dense-XL") == parse_name("XL-E1")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_shipped_recipes_load_and_come_back(name, tmp_path):
    config = load_config(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(str(copy)) == config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_shipped_recipes_draw_grids_that_cost_little(name):
    run, sample = load_config(name).run, load_config(name).sample
    grids = run.total_images // run.sample_every_images
    forwards = grids * sample.num_images * sample.steps * (1 if sample.cfg_scale == 1 else 2)
    assert grids >= 2 and forwards < 0.05 * 3 * run.total_images, "training is a forward pass and twice that backward"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", (1, 2, 4, 32))
def test_shipped_json_resolves_at_many_sizes(path, world):
    raw = read_deepspeed_json(path)
    settings = resolve(raw, world=world, local_world=min(world, 8))
    assert settings.micro_batch * settings.accumulation * world == settings.global_batch
    assert settings.ep_size == min(world, 8)
    assert not settings.bf16 and '"auto"' not in json.dumps(settings.json)
    if path.stem != "cpu":
        assert resolve(raw, world=world, local_world=min(world, 8), device="cuda").bf16


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("model.nam=x", "model.nam: 'nam' is not known; did you mean 'name'?"),
        ("modle.name=x", "'modle' is not known; did you mean 'model'?"),
        ("model.name=s-e16", "model.name: 's-e16' is not known; did you mean 'S-E16'?"),
        ("model.name=M-E8", "model.name: 'M-E8' is not known; did you mean"),
        ("model.name=S-E3", "model.name: 'S-E3' is not known; did you mean 'S-E"),
        ("routing.kind=batchpool", "routing.kind: 'batchpool' is not known; did you mean 'batch_pool'?"),
        ("routing.pool=node", "routing.pool: 'node' is not known; "),
        ("routing.capacity=9", "routing.capacity is 9.0, more than the 8 expert(s)"),
        ("routing.capacity=0", "routing.capacity is 0.0, but it must be above 0"),
        ("model.patch_size=5", "model.patch_size is 5, which does not divide model.input_size 32"),
        ("run.total_images=many", "run.total_images is 'many', but it must be a whole number"),
        ("run.total_images=1.5", "run.total_images is 1.5, but it must be a whole number"),
        ("run.total_images=.inf", "run.total_images is inf, but it must be a whole number"),
        ("run.total_images=-5", "run.total_images is -5, but it must be above 0"),
        ("run.total_images=1e-5", "run.total_images is '1e-5', but it must be a whole number"),
        ("run.total_images=1e300", "run.total_images is '1e300', but it must be a whole number of at most 64 bits"),
        ("run.total_images=true", "run.total_images is True, but it must be a whole number"),
        ("data.path=2024-13-45", "--set data.path: '2024-13-45' is no timestamp; quote it if it is text"),
        ("data.path=!!timestamp x", "--set data.path: 'x' is no timestamp"),
        ("run.seed=0b_", "--set run.seed: '0b_' is no whole number of at most 64 bits"),
        ("run.seed=0x_", "--set run.seed: '0x_' is no whole number"),
        ("run.seed=!!int abc", "--set run.seed: 'abc' is no whole number"),
        ("run.seed=!!int ''", "--set run.seed: '' is no whole number"),
        (f"run.seed={'9' * 5000}", f"--set run.seed: '{'9' * 40}' is no whole number"),
        (f"run.seed=0x{'f' * 5000}", "--set run.seed: '0xfff"),
        ("data.horizontal_flip=!!bool x", "--set data.horizontal_flip: 'x' is no truth value"),
        ("optimizer.lr=!!float x", "--set optimizer.lr: 'x' is no number"),
        ("model=!!map x", "model is '!!map x', but it must be a section"),
        (f"optimizer.lr={'9' * 400}", "--set optimizer.lr: '999"),
        ("run.seed=-1", "run.seed is -1, but it must not be negative"),
        ("optimizer.lr=.nan", "optimizer.lr is nan, but it must be a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9], but it must be a list of 2 numbers"),
        ("ema.decay=1", "ema.decay is 1.0, but it must be at least 0 and below 1"),
        ("model=5", "model is 5, but it must be a section with keys"),
        ("model.name.x=5", "'name' is a value, not a section"),
        ("seed", "'seed' is not of the form section.key=value"),
        ("model.activation_checkpointing=2", "model.activation_checkpointing is 2, but it must be true or false"),
        ("model.num_heads=5", "model.hidden_size is 96, but it must be divisible by 4 and by model.num_heads 5"),
    ),
)
def test_wrong_recipe_values_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("fashion", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_in_scientific_notation_are_numbers():
    assert load_config("fashion", ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4
    assert load_config("fashion", ["run.total_images=2.0e+3"]).run.total_images == 2000
    assert load_config("fashion", ["run.total_images=1e5"]).run.total_images == 100_000
    assert type(load_config("fashion", ["run.total_images=1e5"]).run.total_images) is int


@pytest.mark.parametrize("value", ("2024-13-45", "0b_", "!!bool x", "!!timestamp x", "9" * 5000, "!!map x", "[0x_]"))
def test_a_value_that_is_none_is_named_with_its_file_and_line(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run:\n  seed: {value}\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: is not valid YAML: ") and "line 2" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_empty_section_is_a_section_without_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\nmodel:\ndeepspeed:\n")
    config = load_config(str(path), ["run.total_images=5"])
    assert config.run.total_images == 5 and config.deepspeed == {}


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="'fashon' is not known; did you mean 'fashion'"):
        load_config("fashon")


@pytest.mark.parametrize(
    ("raw", "message"),
    (
        ({"train_batch_sise": 4}, "'train_batch_sise' is not known; did you mean 'train_batch_size'?"),
        ({"zero_optimization": {"stge": 2}}, "zero_optimization: 'stge' is not known; did you mean 'stage'?"),
        ({"optimizer": {"params": {"learning_rate": 1}}}, "optimizer.params: 'learning_rate' is not known"),
        ({"pipeline": {}}, "pipeline is a setting of DeepSpeed that this project does not support"),
        ({}, "train_batch_size or train_micro_batch_size_per_gpu must be a number"),
        ({"train_batch_size": 0}, "train_batch_size is 0, but it must be a positive whole number"),
        ({"train_batch_size": 6}, "train_batch_size 6 is not train_micro_batch_size_per_gpu 1 x"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1},
            "train_batch_size 16 is not train_micro_batch_size_per_gpu 3 x gradient_accumulation_steps 1 x 4 rank(s)",
        ),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 4}}, "stage is 4, but it must be 0, 1, 2 or 3"),
        ({"train_batch_size": 16, "zero_optimization": 2}, "zero_optimization is 2, but it must be an object"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 2, "reduce_scatter": False}}, "must be true"),
        ({"train_batch_size": 16, "fp16": {"enabled": True}}, "fp16 is not supported; use bf16"),
        ({"train_batch_size": 16, "bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes'"),
        ({"train_batch_size": 16, "optimizer": {"type": "Adan"}}, "'Adan' is not known; did you mean 'Adam'"),
        ({"train_batch_size": 16, "optimizer": {"type": "adamw"}}, "'adamw' is not known; did you mean 'AdamW'"),
        ({"train_batch_size": 16, "gradient_clipping": -1}, "gradient_clipping is -1, but it must be a"),
        ({"train_batch_size": 16, "tensorboard": {"enabled": 1}}, "tensorboard.enabled is 1, but it must be true"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "must be true at"),
        ({"train_batch_size": 16, "zero_optimization": {"stage": "auto"}}, "stage is 'auto', but it must be 0, 1, 2"),
        ({"train_batch_size": 16, "zero_optimization": "auto"}, "zero_optimization is 'auto', but it must be an"),
        ({"train_batch_size": 16, "comms_logger": "auto"}, "comms_logger is 'auto', but it must be an object"),
        ({"train_batch_size": 16, "scheduler": {"type": "auto"}}, "scheduler.type is \"auto\", but a recipe has no"),
        ({"train_batch_size": 16, "scheduler": {"type": "WarmupDecayLR"}}, "total_num_steps must be given"),
        ({"train_batch_size": 16, "zero_optimization": {"offload_param": {}}}, "offload_param is a setting of"),
        ({"train_batch_size": 16, "optimizer": {"params": {"lr": "fast"}}}, "lr is 'fast', but it must be a number"),
        ({"train_batch_size": 16, "optimizer": {"params": {"betas": [0.9]}}}, "betas is [0.9], but it must be a list"),
        ({"train_batch_size": 16, "scheduler": {"type": "WarmUpLR"}}, "did you mean 'WarmupLR'"),
        (
            {"train_batch_size": 16, "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "did you mean 'warmup_num_steps'",
        ),
        (
            {"train_batch_size": 16, "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}},
            "cycle_min_lr must be given: neither the recipe nor DeepSpeed has a value",
        ),
        ({"train_batch_size": 10**30}, "below 2^31"),
        ({"train_batch_size": 16, "expert_parallel": {"autoep_size": "big"}}, "autoep_size is 'big', but it must be"),
    ),
)  # fmt: skip
def test_wrong_json_is_named(raw, message):
    with pytest.raises(ConfigError) as error:
        resolve(raw, world=4)
    assert message in str(error.value) and str(error.value).startswith("ds.json: ") and "\n" not in str(error.value)


def test_ep_must_divide_experts_and_world():
    with pytest.raises(
        TopologyError, match=r"autoep_size must divide .* 4 rank\(s\) and the 8 expert\(s\), got 3; valid: 1, 2, 4"
    ):
        resolve({"train_batch_size": 16, "expert_parallel": {"autoep_size": 3}}, world=4)


def test_a_second_ep_size_must_agree():
    raw = {"train_batch_size": 16, "expert_parallel": {"autoep_size": 2}}
    assert resolve(raw, "expert_parallel.autoep_size=2", world=4).ep_size == 2
    with pytest.raises(ConfigError, match=r"autoep_size is 4 in the recipe or --set, but 2 in ds\.json"):
        resolve(raw, "expert_parallel.autoep_size=4", world=4)


def test_json_optimizer_wins_and_says_so():
    settings = resolve({"train_batch_size": 8, "optimizer": {"params": {"lr": 0.5, "eps": "auto"}}})
    assert settings.json["optimizer"]["params"]["lr"] == 0.5
    assert any("optimizer.params.lr is 0.5 from ds.json, not the recipe's" in note for note in settings.notes)


AUTO_ZERO = (
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
)  # fmt: skip


def test_every_auto_is_resolved_and_reported():
    """A file as DeepSpeed users have them, with "auto" wherever it can stand."""
    raw = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "wall_clock_breakdown": "auto",
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "flops_profiler": {"enabled": "auto"},
        "tensorboard": {"enabled": "auto", "output_path": "auto"},
        "expert_parallel": {"autoep_size": "auto"},
        "optimizer": {
            "type": "auto",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay", "torch_adam", "foreach"), "auto"),
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
        "zero_optimization": {
            "stage": 2, **dict.fromkeys(AUTO_ZERO, "auto"),
            "offload_optimizer": {"device": "auto", "pin_memory": "auto"},
        },
    }  # fmt: skip
    settings = resolve(raw, "run.total_images=100", "optimizer.lr=2e-3", world=2)
    assert '"auto"' not in json.dumps(settings.json)
    assert settings.gradient_clipping == 0 and settings.tensorboard and settings.tensorboard_dir is None
    assert settings.json["optimizer"]["type"] == "AdamW" and settings.json["optimizer"]["params"]["torch_adam"] is True
    assert settings.json["scheduler"]["params"] == {"warmup_max_lr": 2e-3, "total_num_steps": 7}
    assert settings.json["zero_optimization"] == {"stage": 2, "offload_optimizer": {}}
    for name in (
        "train_micro_batch_size_per_gpu: auto is 8", "gradient_accumulation_steps: auto is 1",
        "gradient_clipping: auto is 0.0", "steps_per_print: auto is",
        "wall_clock_breakdown: auto is DeepSpeed's default",
        "fp16.enabled: auto is false", "bf16.enabled: auto is false on cpu", "flops_profiler.enabled: auto is",
        "tensorboard.enabled: auto is true", "expert_parallel.autoep_size: auto is 2",
        'optimizer.type: auto is "AdamW"',
        "optimizer.params.lr: auto is 0.002", "optimizer.params.foreach: auto is DeepSpeed's default",
        "scheduler.params.warmup_max_lr: auto is 0.002", "scheduler.params.total_num_steps: auto is 7",
        "scheduler.params.warmup_num_steps: auto is DeepSpeed's default",
        *(f"zero_optimization.{key}: auto is DeepSpeed's default" for key in AUTO_ZERO),
        "zero_optimization.offload_optimizer.device: auto is DeepSpeed's default",
    ):  # fmt: skip
        assert sum(note.startswith(name.split(" auto")[0]) for note in settings.notes) == 1, "each once"
        assert any(note.startswith(name) for note in settings.notes), name


def test_no_clipping_means_none_and_zero_0_is_clipped_by_us():
    assert resolve({"train_batch_size": 8}).json["gradient_clipping"] == 0.0
    clipped = {"train_batch_size": 8, "gradient_clipping": 0.5}
    at_zero_0, at_zero_1 = resolve(clipped), resolve({**clipped, "zero_optimization": {"stage": 1}})
    assert (at_zero_0.gradient_clipping, at_zero_0.json["gradient_clipping"]) == (0.5, 0.0)
    assert (at_zero_1.gradient_clipping, at_zero_1.json["gradient_clipping"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1,}', "is not valid JSON"),
        ("[1]", "holds a list, but it must be an object"),
        (None, "cannot be read: No such file"),
    ),
)
def test_strict_json(tmp_path, text, message):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_json(path)


def test_tensorboard_section_places_the_files():
    section = {"enabled": True, "output_path": "logs", "job_name": "mine"}
    settings = resolve({"train_batch_size": 8, "tensorboard": section})
    assert (settings.tensorboard, settings.tensorboard_dir) == (True, "logs/mine")
    assert "tensorboard" not in settings.json, "DeepSpeed would write a second set of files"
    assert not resolve({"train_batch_size": 8, "tensorboard": {"enabled": False}}).tensorboard
    assert resolve({"train_batch_size": 8}).tensorboard_dir is None
