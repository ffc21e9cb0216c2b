"""`diffmoe checkpoint import-official` of files in the form in which ProMoE and DSMoE publish their weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds import load
from diffmoe_ds.checkpoint.reference_config import infer_reference
from diffmoe_ds.cli import main
from diffmoe_ds.errors import ConfigError
from tests.golden.test_golden import assert_close
from tests.golden.test_routers import MODELS, Golden, changed


def write(directory: Path, name: str) -> Path:
    """A checkpoint as the repositories write it: ProMoE's and DSMoE's keys differ."""
    _, state = changed(name)
    path = directory / "checkpoint.pt"
    raw = {key: torch.zeros_like(value) for key, value in state.items()}
    if name.startswith("promoe"):
        torch.save(
            {"ema_model_state_dict": state, "model_state_dict": raw, "optimizer_state_dict": {}, "step": 7}, path
        )
    else:
        torch.save({"ema": state, "model": raw, "opt": {}, "args": argparse.Namespace(seed=0)}, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_an_import_gives_the_golden_outputs(tmp_path, capsys, name):
    case = Golden(name)
    path, config, out = write(tmp_path, name), tmp_path / "model.json", tmp_path / "imported"
    config.write_text(json.dumps({key: case.config[key] for key in ("kind", "model", "moe")}))
    code = main(["checkpoint", "import-official", str(path), "--reference-config", str(config), "--out", str(out)])
    assert code == 0 and "(ema weights)" in capsys.readouterr().out
    model = load(out).network.eval()
    with torch.no_grad():
        assert_close(model(case.x, case.t_B, case.y).prediction, case.velocity("eval/out"), "eval/out")


def test_the_configuration_of_a_published_promoe_follows_from_its_weights(tmp_path, capsys):
    case = Golden("promoe_flow")
    path, out = write(tmp_path, "promoe_flow"), tmp_path / "imported"
    assert main(["checkpoint", "import-official", str(path), "--num-heads", "4", "--out", str(out)]) == 0
    assert "guessed: 1 expert per token" in capsys.readouterr().out
    model = load(out).network.eval()
    with torch.no_grad():
        assert_close(model(case.x, case.t_B, case.y).prediction, case.velocity("eval/out"), "eval/out")
    assert model.config.routing.contrastive_temperature == 0.07


@pytest.mark.parametrize(("experts", "k", "factor", "groups"), ((16, 2, 2.0, 2), (48, 5, 2.5, 1)))
def test_the_configuration_of_a_published_dsmoe_follows_from_its_weights(experts, k, factor, groups):
    """A model of one block pair of the published width, with as many experts as the published ones."""
    width, hidden = 384, 8
    _, tiny = changed("dsmoe_flow")
    state = {name: value for name, value in tiny.items() if not name.startswith("blocks.")}
    state |= {
        "x_embedder.proj.weight": torch.zeros(width, 4, 2, 2),
        "final_layer.linear.weight": torch.zeros(32, width),
        "y_embedder.embedding_table.weight": torch.zeros(1001, width),
        "blocks.0.mlp.fc1.weight": torch.zeros(4 * width, width),
        "blocks.1.mlp.gate.weight": torch.zeros(experts, width),
        "blocks.1.mlp.gate.e_score_correction_bias": torch.zeros(experts),
        "blocks.1.mlp.experts.blocks.0.up_proj.weight": torch.zeros(hidden, width),
    }
    found, guesses = infer_reference(state)
    assert found["kind"] == "dsmoe" and found["model"]["num_heads"] == 6 and found["model"]["mlp_ratio"] == 4
    expected = {"num_experts": experts, "num_experts_per_tok": k, "routed_scaling_factor": factor, "n_group": groups}
    assert expected.items() <= found["moe"].items()
    assert "latents of 32 by 32" in guesses and f"{k} experts per token, as published with this many experts" in guesses
    state["blocks.1.mlp.gate.weight"] = torch.zeros(7, width)
    with pytest.raises(ConfigError, match=r"no published DSMoE has 7 experts in a layer"):
        infer_reference(state)


def test_the_unused_channels_of_the_output_are_left_out(tmp_path, capsys):
    path, out = write(tmp_path, "promoe_variant_flow"), tmp_path / "imported"
    case = Golden("promoe_variant_flow")
    config = tmp_path / "model.json"
    config.write_text(json.dumps({key: case.config[key] for key in ("kind", "model", "moe")}))
    assert main(["checkpoint", "import-official", str(path), "--reference-config", str(config), "--out", str(out)]) == 0
    assert "Dropped the output's 4 channels for the variance" in capsys.readouterr().out
    rows = case.file["state/final_layer.linear.bias"].reshape(4, 8)[:, :4].flatten()
    np.testing.assert_array_equal(load(out).network.final_layer.linear.bias.detach().numpy(), rows)
