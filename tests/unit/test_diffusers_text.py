"""``checkpoint export --format diffusers`` of text models: the pipeline generates our images from prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import write_model
from diffmoe_ds.checkpoint.stream import Entry
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.text_features import padded_row
from tests.helpers.encoders import tiny_encoder
from tests.helpers.processes import clean_environment
from tests.helpers.sampling import write_random_model
from tests.helpers.sources import ROOT

WORKER = ROOT / "tests" / "helpers" / "diffusers_worker.py"
PROMPTS, NEGATIVE, SEEDS, STEPS = ("red apple", "a small blue car"), "green", [3, 2**64 - 1], 3


class Rows:
    """Prompts whose features were computed one by one."""

    def __init__(self, encoders: TextEncoders, prompts: tuple[str, ...], negative: str) -> None:
        captions = [encoders.encode([prompt])[0] for prompt in (*prompts, negative)]
        self.all = [padded_row(encoders.format.layout, caption.features) for caption in captions]

    def __len__(self) -> int:
        return len(self.all) - 1

    def rows(self, labels: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.all[label] for label in labels]))


@torch.no_grad()
def write_text_model(folder: Path, encoders: TextEncoders, *overrides: str) -> DiT:
    """Export a tiny text model with random weights; return it in eval mode."""
    shapes = [[e.tokens, e.width, e.pooled] for e in encoders.format.encoders]
    text = ("model.conditioning=text", f"model.text_encoders={json.dumps(shapes)}")
    torch.manual_seed(0)
    model = DiT(load_config("fashion", ["model.name=nano-E4", "model.patch_size=8", *text, *overrides])).eval()
    for parameter in model.parameters():
        parameter.copy_(0.15 * torch.randn(parameter.shape))
    for layer in model.moe_layers().values():
        if layer.capacity_predictor is not None:
            layer.expert_threshold.fill_(0.5)
    model.y_embedder.null_row.copy_(torch.from_numpy(encoders.format.null_row))
    entries = [Entry(name, tuple(t.shape), torch.float32, [t]) for name, t in model.state_dict().items()]
    write_model(folder, entries, Description(model.config, text=encoders.format), "ema", images=16)
    return model


def export(model: Path, *options: str) -> Path:
    out = model.with_name(f"{model.name}-diffusers")
    command = ["checkpoint", "export", str(model), "--format", "diffusers", "--out", str(out), *options]
    assert main(command) == 0
    return out


def load(folder: Path):
    from diffmoe_ds.interop.standalone.diffmoe_conditioner import DiffMoETextConditioner
    from diffmoe_ds.interop.standalone.diffmoe_transformer import DiffMoETransformer2DModel
    from diffmoe_ds.interop.standalone.pipeline import DiffMoEPipeline

    transformer = DiffMoETransformer2DModel.from_pretrained(folder / "transformer")
    pipe = DiffMoEPipeline(transformer, conditioner=DiffMoETextConditioner.from_pretrained(folder / "conditioner"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("kinds", "overrides"),
    (
        (("t5",), ()),
        (("clip", "bert"), ("objective.kind=ddpm",)),
        (("qwen2", "clip-plain"), ("model.text_qk_norm=false", "model.label_dropout=0")),
    ),
)
def test_the_images_of_prompts_are_ours(tmp_path, kinds, overrides):
    encoders = TextEncoders([str(tiny_encoder(kind)) for kind in kinds], torch.device("cpu"), 8)
    model = write_text_model(tmp_path / "model", encoders, *overrides)
    pipe = load(export(tmp_path / "model"))
    for scale, negative in ((1.0, ""), (2.0, ""), (2.0, NEGATIVE)):
        model.y_embedder.prompts = Rows(encoders, PROMPTS, negative)
        model.set_inference(model.config.inference_choices[0])
        sampler = {"flow": "euler", "ddpm": "ddpm"}[pipe.objective]
        settings = SamplingSettings(sampler=sampler, steps=STEPS, cfg_scale=scale)
        expected = generate(model, torch.tensor([0, 1]), SEEDS, settings)
        call = {"guidance_scale": scale, "negative_prompt": negative, "seeds": SEEDS, "num_inference_steps": STEPS}
        found = pipe(prompt=list(PROMPTS), **call, output_type="latent").images
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
        other = pipe(prompt=[PROMPTS[1], PROMPTS[0]], **call, output_type="latent").images
        assert (other - found).abs().max() > 0.01 * expected.abs().max(), "the prompt matters"


def one_encoder(kind: str = "t5") -> TextEncoders:
    return TextEncoders([str(tiny_encoder(kind))], torch.device("cpu"), 8)


def test_the_folder_names_the_text_encoder(tmp_path, capsys):
    write_text_model(tmp_path / "model", one_encoder())
    folder = export(tmp_path / "model")
    name = str(tiny_encoder("t5"))
    settings = json.loads((folder / "conditioner" / "config.json").read_text())
    assert [encoder["name"] for encoder in settings["encoders"]] == [name]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and 'pipe(prompt="red apple", seeds=[0, 1])' in card
    assert f"| text encoder | {name} (8 tokens, 16 wide, sha256 " in card and "| classes |" not in card
    assert "model.conditioning is text" in capsys.readouterr().err


def test_an_empty_prompt_is_the_null_condition_and_loads_no_encoder(tmp_path):
    encoders = one_encoder()
    write_text_model(tmp_path / "model", encoders)
    pipe = load(export(tmp_path / "model"))
    rows = pipe.conditioner.encode(["", " "])
    assert np.array_equal(rows.numpy(), np.stack([encoders.format.null_row] * 2))
    assert not pipe.conditioner._loaded


def test_mistakes_in_a_call_are_named(tmp_path):
    write_text_model(tmp_path / "model", one_encoder())
    folder = export(tmp_path / "model")
    for call, message in (
        ({}, "prompt must be one or more texts, got None"),
        ({"prompt": []}, "prompt must be one or more texts"),
        ({"prompt": ["a", 5]}, "prompt must be one or more texts"),
        ({"class_labels": 1, "prompt": "a"}, "the model generates images from prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder)(**call, num_inference_steps=1)
    settings = json.loads((folder / "conditioner" / "config.json").read_text())
    for kind, message in (("bert", "not the text encoders, or not the versions"), ("clip", "of another width")):
        settings["encoders"][0]["name"] = str(tiny_encoder(kind))
        (folder / "conditioner" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load(folder)(prompt="red", num_inference_steps=1)


def test_a_class_model_refuses_prompts(tmp_path):
    from diffmoe_ds.interop.standalone.diffmoe_transformer import DiffMoETransformer2DModel
    from diffmoe_ds.interop.standalone.pipeline import DiffMoEPipeline

    folder = export(write_random_model(tmp_path / "model"))
    assert not (folder / "conditioner").exists()
    pipe = DiffMoEPipeline(DiffMoETransformer2DModel.from_pretrained(folder / "transformer"))
    for call in ({"prompt": "red apple"}, {"negative_prompt": "red"}):
        with pytest.raises(ValueError, match="the model generates images from classes"):
            pipe(**call)


@pytest.mark.slow
def test_diffusers_loads_the_folder_and_what_it_saves(tmp_path):
    """Without this package, and through `save_pretrained`."""
    write_text_model(tmp_path / "model", one_encoder())
    folder = export(tmp_path / "model")
    call = {"prompt": list(PROMPTS), "seeds": [3, 4], "num_inference_steps": STEPS, "guidance_scale": 2.0}
    job = {"folder": str(folder), "class": "DiffusionPipeline", "load": {"trust_remote_code": True}, "call": call}
    (tmp_path / "jobs.json").write_text(json.dumps([job, {**job, "save": str(tmp_path / "saved")}]))
    environment = clean_environment(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = load(folder)(**call, output_type="np").images[..., 0] * 255
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as file:
            assert np.abs(file["images"] - expected).max() <= 1 and expected.std() > 5
