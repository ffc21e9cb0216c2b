"""Checkpoints of the reference with the YAML of their training give its numbers; other configurations are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import diffmoe_ds
from diffmoe_ds.checkpoint.export import WEIGHTS, ModelFileReader
from diffmoe_ds.checkpoint.restore import restore_weights
from diffmoe_ds.cli import main
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.topology import Topology
from tests.golden.test_golden import RELEASED, assert_close, golden, inputs


def state_of(file: dict[str, np.ndarray], prefix: str = "state/") -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(value) for key, value in file.items() if key.startswith(prefix)}


def experiment(folder: Path, name: str = "reference_yaml_flow", **changes: Any) -> Path:
    """Write a directory as the reference does, and return its checkpoint.

    Args:
        folder: of the experiment.
        name: of the golden file.
        changes: values of ``model.params``, or with ``basic_`` or ``experts_`` before the name, of those sections.
    """
    file = golden(name)
    tree = yaml.safe_load(str(file["yaml"]))
    params = tree["model"]["params"]
    for key, value in changes.items():
        section, _, rest = key.partition("_")
        target = {"basic": tree["basic"], "experts": params["MoE_config"], "model": tree["model"]}.get(section, params)
        target[key if target is params else rest] = value
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config_2025-02-08T10-14-26.yaml").write_text(yaml.safe_dump(tree))
    path = folder / "checkpoints" / "0000100.pt"
    torch.save({"model": state_of(file), "ema": state_of(file, "ema/") or state_of(file)}, path)
    return path


def convert(path: Path, *options: str) -> int:
    return main(["checkpoint", "import-official", str(path), "--out", str(path.parent / "out"), *options])


def load(folder: Path) -> DiT:
    """Return an exported model, which routes like the reference."""
    reader = ModelFileReader(folder)
    model = DiT(reader.config).eval()
    restore_weights(model, reader, Topology(0, 1, 1, reader.config.num_experts), WEIGHTS[reader.weights])
    model.set_inference("dynamic" if reader.config.routing.kind == "batch_pool" else "static")
    return model


@torch.no_grad()
def predict(model: DiT, file: dict[str, np.ndarray]) -> torch.Tensor:
    return model(*inputs(file)).prediction


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("place", ("experiment", "beside", "named"))
def test_the_yaml_configures_the_model(tmp_path, capsys, name, place):
    path = experiment(tmp_path / "exps", name)
    file, (config,) = golden(name), path.parent.parent.glob("*.yaml")
    if place == "beside":
        config = config.rename(path.with_suffix(".yml"))
    elif place == "named":
        config = config.rename(tmp_path / "elsewhere")
    options = ["--reference-config", str(config)] if place == "named" else []
    assert convert(path, "--weights", "raw", *options) == 0
    output = capsys.readouterr().out
    assert f"configuration of {config}" in output and "guessed" not in output
    model = load(path.parent / "out")
    assert model.config.routing.capacity == json.loads(str(file["config"]))["moe"]["capacity"]
    assert model.config.size.num_heads == 16 and model.config.objective.kind == "flow"
    assert_close(predict(model, file), file["eval/out"], name)


def test_averaged_weights(tmp_path):
    path, file = experiment(tmp_path), golden("reference_yaml_flow")
    assert convert(path) == 0
    assert_close(predict(load(path.parent / "out"), file), file["eval_ema/out"], "ema")


def test_models_without_label_dropout_keep_their_last_class(tmp_path):
    path = experiment(tmp_path, class_dropout_prob=0, num_classes=11)
    assert convert(path) == 0
    config = load(path.parent / "out").config
    assert (config.model.num_classes, config.model.label_dropout) == (11, 0)


def test_ddpm_and_defaults_of_the_class(tmp_path):
    path = experiment(tmp_path, basic_rf=False, use_swiglu=None, CapacityPred_loss_weight=None, mlp_ratio=2)
    assert convert(path) == 0
    config = load(path.parent / "out").config
    assert (config.objective.kind, config.routing.capacity_weight) == ("ddpm", 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"basic_rf": False, "learn_sigma": False}, "learn_sigma: DDPM models without learned variance"),
        ({"basic_rf_ori": True}, "basic.rf_ori: this flow is not supported"),
        ({"model_target": "models.models_DiffMoE.DiT2"}, "did you mean 'models.models_DiffMoE.DiT'"),
        ({"qk_norm": True}, "model.params.qk_norm: not supported"),
        ({"head_dim": 3}, "head_dim: a head width other than hidden_size / num_heads is not supported"),
        ({"experts_norm": True}, "model.params.MoE_config.norm: not supported"),
        ({"hidden_size": "wide"}, "model.params.hidden_size: must be a number, got 'wide'"),
        ({"experts_num_experts": [8]}, "model.params.MoE_config.num_experts: must be a number, got [8]"),
        ({"MoE_config": 8}, "model.params.MoE_config: must be a mapping"),
        ({"num_heads": 7}, "7"),
        ({"depth": 6}, "lack 'blocks.4."),
        ({"num_classes": 12}, "has shape (11, 64), but the model's is (13, 64)"),
        ({"mlp_ratio": 4}, "has shape"),
        (
            {"model_target": "models.models_ECDiT.DiT"},
            "those of the model class 'diffmoe' (capacity predictors), but 'ec' was requested",
        ),
        ({"model_target": "models.models_DiT.DiT"}, "but 'dense' was requested"),
        ({"experts_n_shared_experts": 2}, "n_shared_experts is 2, but the weights have 0"),
        ({"learn_sigma": False}, "learn_sigma is False, but the weights have an output of 8 channels for inputs of 4"),
        ({"experts_capacity": None}, "model.params.MoE_config.capacity is missing"),
        ({"MoE_config": None}, "model.params.MoE_config.num_experts is missing"),
    ),
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, capsys, changes, message):
    path = experiment(tmp_path, **changes)
    assert convert(path) in (2, 5)
    captured = capsys.readouterr()
    assert message in captured.err and "config_2025-02-08T10-14-26.yaml" in captured.err, captured.err
    assert captured.err.count("\n") == 1 and not captured.out and not (path.parent / "out").exists()


@pytest.mark.parametrize(("name", "kind"), (("reference_ec_c2", "ec"), ("reference_tc_c2", "tc")))
def test_weights_without_capacity_predictors_are_not_a_diffmoe(tmp_path, capsys, name, kind):
    path = experiment(tmp_path, name, model_target="models.models_DiffMoE.DiT")
    assert convert(path) == 5
    assert f"those of the model class {kind!r}" in capsys.readouterr().err and not (path.parent / "out").exists()


def test_an_output_without_variance_does_not_learn_it(tmp_path, capsys):
    path = experiment(tmp_path)
    state = {name: value[:16] if "final_layer.linear" in name else value for name, value in state_of(
        golden("reference_yaml_flow")).items()}  # fmt: skip
    torch.save({"ema": state}, path)
    assert convert(path) == 5
    assert "learn_sigma is True, but the weights have an output of 4 channels" in capsys.readouterr().err


def test_what_the_import_decides_is_printed(tmp_path, capsys):
    path = experiment(tmp_path)
    assert convert(path) == 0
    output = capsys.readouterr().out
    assert "Dropped the output's 4 channels for the variance" in output and "--routing dynamic" in output
    assert output.endswith("(ema weights)\n") and "count as raw" not in output
    assert diffmoe_ds.load(path.parent / "out").config.model_name == "custom-E8"
    model = (path.parent / "out" / "model.safetensors").read_bytes()
    assert convert(path, "--weights", "raw") == 5
    assert f"--out {path.parent / 'out'}: already holds model.safetensors" in capsys.readouterr().err
    assert (path.parent / "out" / "model.safetensors").read_bytes() == model
    (tmp_path / "other").mkdir()
    torch.save(state_of(golden("dense_flow")), tmp_path / "other" / "dense.pt")
    assert convert(tmp_path / "other" / "dense.pt", "--num-heads", "4") == 0
    output = capsys.readouterr().out
    assert "Dropped" not in output and "--routing" not in output


def test_weights_are_averaged_only_if_the_file_or_the_user_says_so(tmp_path, capsys):
    state = state_of(golden("dense_flow"))
    for number, (tree, options, weights, hint) in enumerate((
        (state, [], "raw", True), ({"model": state}, [], "raw", True), ({"model": {}, "ema": state}, [], "ema", False),
        (state, ["--weights", "ema"], "ema", False), ({"model": state}, ["--weights", "raw"], "raw", False),
    )):  # fmt: skip
        path, out = tmp_path / f"{number}.pt", tmp_path / str(number)
        torch.save(tree, path)
        assert main(
            ["checkpoint", "import-official", str(path), "--num-heads", "4", "--out", str(out), *options]
        ) == 0  # fmt: skip
        assert json.loads((out / "config.json").read_text())["weights"] == weights
        output = capsys.readouterr().out
        assert f"({weights} weights)" in output and ("count as raw" in output) == hint
    torch.save({"model": state}, path)
    assert convert(path, "--num-heads", "4", "--weights", "ema") == 5
    assert "holds no weights under ema, ema_model, ema_model_state_dict or at its top level" in capsys.readouterr().err


def test_which_yaml_is_meant(tmp_path, capsys):
    path = experiment(tmp_path)
    (tmp_path / "config_2025-02-08T10-14-26.yaml").rename(tmp_path / "a.yaml")
    for name, text in (("list.yaml", "[1]"), ("invalid.yml", "a: ["), ("foreign.yaml", "model: {target: x}")):
        (tmp_path / name).write_text(text)
    assert convert(path) == 0
    assert f"configuration of {tmp_path / 'a.yaml'}" in capsys.readouterr().out
    (tmp_path / "b.yaml").write_bytes((tmp_path / "a.yaml").read_bytes())
    assert convert(path) == 2
    assert f"found several configurations ({tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'}); choose one with" in (
        capsys.readouterr().err
    )
    for name, code, message in (
        ("none.yaml", 2, "cannot be read"), ("foreign.yaml", 2, "not a configuration of the reference"),
        ("invalid.yml", 2, "invalid YAML"),
    ):  # fmt: skip
        assert convert(path, "--reference-config", str(tmp_path / name)) == code
        assert f"{tmp_path / name}: {message}" in capsys.readouterr().err
    chosen = ["--reference-config", str(tmp_path / "a.yaml")]
    (tmp_path / "b.yaml").unlink()
    for options in (chosen, []):  # given, and found by itself
        for option, value, configured in (("--num-heads", "8", "16"), ("--kind", "ec", "diffmoe")):
            assert convert(path, *options, option, value) == 2
            message = f"{option} {value}: the model is configured by {tmp_path / 'a.yaml'}, where it is {configured}."
            assert message in capsys.readouterr().err
    (tmp_path / "a.yaml").unlink()
    assert convert(path) == 2 and f"{tmp_path / 'invalid.yml'}: invalid YAML" in capsys.readouterr().err


def test_options_that_agree_with_the_yaml_are_accepted(tmp_path, capsys):
    assert convert(experiment(tmp_path), "--num-heads", "16", "--kind", "diffmoe") == 0
    assert "guessed" not in capsys.readouterr().out


def test_guesses_are_printed(tmp_path, capsys):
    path = experiment(tmp_path)
    (tmp_path / "config_2025-02-08T10-14-26.yaml").unlink()
    assert convert(path, "--num-heads", "16") == 0
    output = capsys.readouterr().out
    assert "guessed: DDPM, because" in output and "guessed: capacity 1" in output and "10 classes" in output
    assert "attention heads" not in output and "--reference-config" in output
    torch.save(state_of(golden("dense_flow")), tmp_path / "dense.pt")
    assert convert(tmp_path / "dense.pt", "--num-heads", "4") == 0
    output = capsys.readouterr().out
    assert "guessed: flow, because" in output and "capacity" not in output
