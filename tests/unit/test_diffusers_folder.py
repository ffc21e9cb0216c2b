"""``checkpoint export --format diffusers``: without this package, diffusers generates our images from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffmoe_ds
from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.shards import EMBEDDED_CLASSES
from tests.helpers.data import tiny_vae
from tests.helpers.processes import clean_environment
from tests.helpers.sampling import write_random_model
from tests.helpers.sources import ROOT

WORKER = ROOT / "tests" / "helpers" / "diffusers_worker.py"
DENSE = ("model.name=Dense-nano", "routing.kind=dense", "objective.kind=ddpm", "model.mlp_ratio=4")
LATENT = ("model.input_size=8", "model.in_channels=4", "model.patch_size=2")
MODELS = {
    "flow": (),
    "ddpm": ("objective.kind=ddpm",),
    "expert_choice": ("routing.kind=expert_choice", "model.mlp=swiglu", "routing.shared_experts=1"),
    "token_choice": (
        "routing.kind=token_choice", "routing.capacity=2", "routing.interleave=false", "model.label_dropout=0",
        "objective.flow_time_scale=1000",
    ),
    "dense_pixels": DENSE,
    "dense_flow": ("model.name=Dense-nano",),
    "latent": LATENT,
    "stock": (*DENSE, *LATENT, "model.num_classes=1000"),
}  # fmt: skip
GUIDED = {"cfg_scale": 2.0}
CALLS = [
    ("flow", {}), ("flow", {**GUIDED}), ("flow", {"sampler": "heun"}), ("flow", {"routing": "dynamic", **GUIDED}),
    ("flow", {"routing": "static"}), ("ddpm", {"sampler": "ddim", **GUIDED}), ("ddpm", {"routing": "static", **GUIDED}),
    ("ddpm", {"routing": "dynamic", "sampler": "ddim", **GUIDED}), ("expert_choice", {}),
    ("expert_choice", {"routing": "dynamic", **GUIDED}), ("token_choice", {}), ("dense_pixels", {**GUIDED}),
    ("dense_flow", {**GUIDED}), ("latent", {**GUIDED}), ("stock", {**GUIDED}), ("stock", {"sampler": "ddim"}),
]  # fmt: skip
"""Models, and arguments of our `Model.sample`."""
STEPS, SEEDS, CLASSES = 6, (3, 4, 2**64 - 1), [2, 5]


def folder_of(model: Path) -> Path:
    return model.with_name(f"{model.name}-diffusers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """All models, each with its folder for diffusers and the inputs of its transformer."""
    place = tmp_path_factory.mktemp("exported")
    tiny_vae(place / "vae")
    for name, overrides in MODELS.items():
        names = None if name == "stock" else EMBEDDED_CLASSES
        model = write_random_model(place / name, names, overrides=overrides)
        vae = ["--vae", str(place / "vae")] if name in ("latent", "stock") else []
        command = ["checkpoint", "export", str(model), "--format", "diffusers", "--out", str(folder_of(model)), *vae]
        assert main(command) == 0
        settings = diffmoe_ds.load(model).config
        size, channels = settings.model.input_size, settings.model.in_channels
        t = torch.tensor([0.0, 0.3, 0.9]) if settings.objective.kind == "flow" else torch.tensor([0, 400, 999])
        np.savez(place / f"{name}.npz", x=torch.randn(3, channels, size, size), t=t, y=[0, 6, 9])
    return place


def job(place: Path, name: str, call: dict, cls: str = "DiffusionPipeline", **load: object) -> dict:
    return {
        "folder": str(folder_of(place / name)), "class": cls, "load": load, "call": call,
        "inputs": str(place / f"{name}.npz"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(exported) -> list[dict[str, np.ndarray]]:
    """Results of all calls, of `DiTPipeline`, and of our pipeline for the folder that `DiTPipeline` loads."""
    jobs = []
    for name, arguments in CALLS:
        call = {"class_labels": CLASSES, "seeds": SEEDS, "num_inference_steps": STEPS, **arguments}
        call["guidance_scale"] = call.pop("cfg_scale", 1.0)
        custom = {"custom_pipeline": str(folder_of(exported / name))} if name == "stock" else {}
        jobs.append(job(exported, name, call, trust_remote_code=True, **custom))
    stock = {"class_labels": [1, 2], "num_inference_steps": 4, "generator": 0}
    jobs.append(job(exported, "stock", stock, "DiTPipeline"))
    named = {"class_labels": ["BAG", "3"], "seeds": [0, 1], "num_inference_steps": 1}
    jobs.append(job(exported, "flow", named, trust_remote_code=True))
    jobs[-1]["save"] = str(exported / "saved-flow")
    jobs[len(CALLS) - 1]["save"] = str(exported / "saved-stock")
    (exported / "jobs.json").write_text(json.dumps(jobs))
    environment = clean_environment(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(exported / "cache"))
    command = [sys.executable, str(WORKER), str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not expected by" not in done.stderr and "not initialized" not in done.stderr
    return [dict(np.load(exported / f"{index}.npz")) for index in range(len(jobs))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", range(len(CALLS)), ids=lambda i: "-".join(map(str, (CALLS[i][0], *CALLS[i][1].values())))
)
def test_the_images_and_outputs_are_ours(exported, results, index):
    name, arguments = CALLS[index]
    model = diffmoe_ds.load(exported / name, vae=exported / "vae" if name in ("latent", "stock") else None)
    expected = model.sample(classes=CLASSES, seeds=SEEDS, steps=STEPS, **arguments).images
    found = results[index]["images"].reshape(expected.shape).astype(int)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5
    model.network.set_inference(arguments.get("routing", model.config.inference_choices[0]))
    with np.load(exported / f"{name}.npz") as file, torch.no_grad():
        output = model.network(*(torch.from_numpy(file[key]) for key in ("x", "t", "y"))).prediction.numpy()
    assert np.abs(results[index]["outputs"] - output).max() <= 1e-5 * np.abs(output).max()


@pytest.mark.slow
def test_the_stock_pipeline_and_names(exported, results):
    stock, named = results[-2:]
    assert stock["images"].shape == (2, 32, 32, 3) and stock["images"].std() > 5
    expected = diffmoe_ds.load(exported / "flow").sample(classes=["bag", 3], seeds=[0, 1], steps=1).images
    assert np.abs(named["images"].astype(int) - expected[..., 0]).max() <= 1
    assert "generates images, with a VAE" in (folder_of(exported / "stock") / "README.md").read_text()
    for name, router in (("dense_flow", "dense"), ("flow", "batch pool (DiffMoE)")):
        card = (folder_of(exported / name) / "README.md").read_text()
        assert f"(router: {router})" in card and f"| router | {router} |" in card
    # only the pipeline of the folder corrects the time embedding
    ours = results[[name for name, _ in CALLS].index("stock")]["outputs"]
    assert np.abs(stock["outputs"] - ours).max() > 1e-3 * np.abs(ours).max()


def export(model: Path, out: Path, *options: str) -> int:
    return main(["checkpoint", "export", str(model), "--format", "diffusers", "--out", str(out), *options])


def test_the_card_of_a_run_has_its_figures_and_warnings(run_copy, tmp_path, capsys):
    metrics = {"frechet": 12.5, "extractor": "efficientnet-lite0", "n": 500, "n_reference": 1000}
    rows = [
        {"images": 64, "validation_loss": 0.5, "validation_images": 7},
        {"images": 96, "validation_loss": 0.25, "validation_images": 7, "metrics": metrics},
        {"images": 160, "validation_loss": 0.125},  # after this checkpoint
    ]
    (run_copy / "validation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert export(run_copy, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model: objective.kind is flow, routing.kind is batch_pool and model.mlp_ratio is 2." in card
    for part in (
        "library_name: diffusers", "| trained on | 96 images |", "| weights | averaged (EMA) |", "bag", "per_token",
        "| validation loss | 0.2500 (7 held-out images) |", "which need trust_remote_code=True",
        "| Frechet distance | 12.5 (efficientnet-lite0, 500 images against 1000) |", "routing.kind is batch_pool",
    ):  # fmt: skip
        assert part in card, part
    assert "0.125" not in card and "routing.kind is batch_pool" in capsys.readouterr().err
    assert export(run_copy, tmp_path / "raw", "--weights", "raw") == 0
    raw = (tmp_path / "raw" / "README.md").read_text()
    assert "of the last step (raw)" in raw and "Evaluation" not in raw


def test_an_average_of_mostly_initial_weights_is_noted(tmp_path, capsys):
    model = write_random_model(tmp_path / "model")
    description = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**description, "initial_share": 0.4}))
    assert export(model, tmp_path / "out") == 0
    sentence = "averaged weights still contain 40% of the initial weights"
    assert sentence in (tmp_path / "out" / "README.md").read_text() and sentence in capsys.readouterr().err


def test_the_vae_of_the_run_is_copied_or_named(tmp_path, capsys):
    vae = tiny_vae(tmp_path / "pipeline" / "vae").parent
    for name, path, expected in (
        ("local", str(vae), None), ("hub", "stabilityai/sd-vae-ft-mse", 'from_pretrained("stabilityai/sd-vae-ft-mse")'),
        ("gone", "/nowhere/vae", 'from_pretrained("...")'),
    ):  # fmt: skip
        model = write_random_model(tmp_path / name, overrides=(*LATENT, f"data.vae={path}"))
        assert export(model, tmp_path / f"{name}-out") == 0
        index = json.loads((tmp_path / f"{name}-out" / "model_index.json").read_text())
        assert (tmp_path / f"{name}-out" / "vae" / "config.json").is_file() == ("vae" in index) == (expected is None)
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert ("AutoencoderKL" in card) == (expected is not None) and "/nowhere" not in card
        if expected is not None:
            assert expected in card and expected in capsys.readouterr().err


def test_mistakes_are_named_and_leave_nothing(exported, tmp_path, capsys):
    vae, out = str(exported / "vae"), tmp_path / "out"
    three = write_random_model(tmp_path / "three", overrides=("model.in_channels=8", "model.input_size=8"))
    for model, options, code, message in (
        (exported / "flow", ["--vae", vae], 2, "the model generates pixels (1 channel); omit it"),
        (three, ["--vae", vae], 2, "decodes latents of 4 channels, but the model generates 8"),
        (exported / "latent", ["--vae", str(tmp_path)], 2, "not a folder with a diffusers AutoencoderKL"),
        (exported / "flow", ["--format", "native", "--vae", vae], 2, "needs --format diffusers"),
        (exported / "flow", ["--weights", "raw"], 5, "holds only ema weights"),
        (tmp_path / "nothing", [], 5, "not a checkpoint, run directory or exported model"),
    ):
        assert export(model, out, *options) == code
        assert message in capsys.readouterr().err
        assert not any("out" in path.name for path in tmp_path.iterdir())
    named = write_random_model(tmp_path / "named", overrides=(*LATENT, f"data.vae={tmp_path}"))
    assert export(named, out) == 2 and f"data.vae of the run, {tmp_path}: not a folder with" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert export(exported / "flow", tmp_path / "full") == 5
    assert "full: already exists; pass a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_mistakes_in_a_call_are_named(exported):
    from diffmoe_ds.interop.standalone.diffmoe_transformer import DiffMoETransformer2DModel
    from diffmoe_ds.interop.standalone.pipeline import DiffMoEPipeline

    def load(name: str) -> DiffMoEPipeline:
        transformer = DiffMoETransformer2DModel.from_pretrained(folder_of(exported / name) / "transformer")
        return DiffMoEPipeline(transformer, id2label={"0": "bag"})

    for name, call, message in (
        ("flow", {"class_labels": "shoe"}, "class_labels must be from 0 to 9 or a name of bag, got 'shoe'"),
        ("flow", {"class_labels": [10]}, "got '10'"),
        ("flow", {"class_labels": []}, "at least one class"),
        ("flow", {"seeds": [-1]}, "seeds must be one or more integers"),
        ("flow", {"seeds": 5}, "such as range(8), got 5"),
        ("flow", {"seeds": [0.5]}, "such as range(8), got [0.5]"),
        ("flow", {"num_inference_steps": 0}, "num_inference_steps must be from 1"),
        ("flow", {"sampler": "ddim"}, "sampler must be euler or heun, got 'ddim'"),
        ("flow", {"routing": "best"}, "routing must be per_token or dynamic or static for this model, got 'best'"),
        ("flow", {"output_type": "jpg"}, "output_type must be pil, np, pt or latent, got 'jpg'"),
        ("ddpm", {"num_inference_steps": 1001}, "num_inference_steps must be from 1 to 1000, got 1001"),
        ("token_choice", {"guidance_scale": 2.0}, "guidance_scale must be 1"),
        ("latent", {}, "the model generates latents; pass vae="),
    ):
        with pytest.raises(ValueError) as error:
            load(name)(**{"class_labels": 1, **call})
        assert message in str(error.value)
    pipe = load("flow")
    with pytest.raises(ValueError, match="without its code"):
        pipe.save_pretrained(exported / "hub", push_to_hub=True)
    same = [pipe("bag", generator=torch.Generator().manual_seed(1), output_type="pt").images for _ in range(2)]
    assert torch.equal(*same) and same[0].shape == (1, 1, 32, 32)
