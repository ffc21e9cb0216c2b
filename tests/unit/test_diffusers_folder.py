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
    "dense_flow": ("model.name=Dense-nano", "routing.kind=dense"),
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
    (exported / "jobs.json").write_text(json.dumps(jobs))
    environment = clean_environment(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(exported / "cache"))
    command = [sys.executable, str(WORKER), str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not expected by" not in done.stderr and "not initialized" not in done.stderr
    return [dict(np.load(exported / f"{index}.npz")) for index in range(len(jobs))]


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


def test_the_stock_pipeline_and_names(exported, results):
    stock, named = results[-2:]
    assert stock["images"].shape == (2, 32, 32, 3) and stock["images"].std() > 5
    expected = diffmoe_ds.load(exported / "flow").sample(classes=["bag", 3], seeds=[0, 1], steps=1).images
    assert np.abs(named["images"].astype(int) - expected[..., 0]).max() <= 1
    # only the pipeline of the folder corrects the time embedding
    ours = results[[name for name, _ in CALLS].index("stock")]["outputs"]
    assert np.abs(stock["outputs"] - ours).max() > 1e-3 * np.abs(ours).max()
