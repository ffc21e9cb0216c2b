"""Runs without training, for reports: a small model with random weights and the log files of a run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import torch

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import write_model
from diffmoe_ds.checkpoint.stream import Entry
from diffmoe_ds.config.load import config_from_dict, dump_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.training.log_files import TensorBoardLog
from tests.helpers.data import text_features

NAMES = ("<b>boot</b>", "bag & $belt$", "coat")
"""Class names that must be escaped."""


def report_config(kind: str, objective: str = "flow", **model: object) -> Config:
    """Return the configuration of a model with 16 tokens and three classes."""
    small = {"name": "nano-E4", "patch_size": 4, "input_size": 16, "in_channels": 1, "num_classes": 3}
    tree = {
        "model": {**small, **model},
        "routing": {"kind": kind},
        "objective": {"kind": objective},
        "run": {"total_images": 96},
    }
    return config_from_dict(tree, "a test")


def text_config(shards: object, **model: object) -> Config:
    """Return the configuration of such a model with prompts, whose encoder is that of `text_features`."""
    text = {"conditioning": "text", "text_encoders": [[4, 3, 2]], "num_classes": 1}
    config = report_config("batch_pool", **text, **model)
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(shards)})})


@torch.no_grad()
def random_model(config: Config) -> DiT:
    """Return a model whose weights are all random, so that its predictions and its routing vary."""
    torch.manual_seed(0)
    model = DiT(config)
    model.reset_positions()
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape))
    for layer in model.moe_layers().values():
        if layer.capacity_predictor is not None:
            layer.expert_threshold.fill_(0.5)
    if config.is_text:
        model.y_embedder.null_row.copy_(torch.from_numpy(text_features().null_row))
    model.set_inference(config.inference_choices[0])
    return model.eval()


def write_run(folder: Path, config: Config, rows: int = 40, images: int = 96, is_logged: bool = True) -> Path:
    """Write a run directory whose model is an exported one.

    Args:
        folder: the directory.
        config: of the run.
        rows: optimizer steps of ``metrics.jsonl``.
        images: images that the model was trained on.
        is_logged: whether to write log files beside ``metrics.jsonl``, too.
    """
    model = random_model(config)
    described = Description(config, text=text_features()) if config.is_text else Description(config, NAMES)
    entries = [Entry(name, tuple(t.shape), torch.float32, [t]) for name, t in model.state_dict().items()]
    write_model(folder, entries, described, "ema", images)
    (folder / "resolved.yaml").write_text(dump_config(config))
    lines = [json.dumps(_row(step)) + "\n" for step in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "ima')  # as a killed run leaves it
    if is_logged:
        _write_logs(folder, model)
    return folder


def _row(step: int) -> dict[str, float]:
    losses = {"loss": 2 / step + 0.1, "diffusion_loss": 1 / step + 0.1, "capacity_loss": 1 / step}
    return {"step": step, "images": 16 * step, **losses, "grad_norm": 1.5, "lr": 1e-3, "images_per_s": 32.0}


def _write_logs(folder: Path, model: DiT) -> None:
    with (folder / "validation.jsonl").open("w") as file:
        for step in (20, 40):
            row = {
                "step": step,
                "images": 16 * step,
                "validation_loss": 1 / step,
                "validation_loss_by_noise_level": [0.1 * level / step for level in range(10)],
                "validation_images": 1234,
                "metrics": {"extractor": "random", "n": 10, "n_reference": 1234, "frechet": 100 / step},
            }
            file.write(json.dumps(row) + "\n")
    board = TensorBoardLog(folder / "tensorboard", 0)
    for block, layer in model.moe_layers().items():
        for expert in range(layer.num_experts if layer.capacity_predictor is not None else 0):
            for images in (16, 32):
                board.add_scalar(f"threshold/block_{block:02d}/expert_{expert:02d}", 0.1 * expert, images)
    board.close()


class ReadPage(HTMLParser):
    """What a page consists of."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def figures(self) -> list[str]:
        """Names of the figures."""
        return [attributes["id"] for tag, attributes in self.tags if tag == "figure"]

    def references(self) -> list[str]:
        """Everything that the page refers to."""
        found = [attributes[key] for _, attributes in self.tags for key in ("src", "href") if key in attributes]
        ids = {attributes["id"] for _, attributes in self.tags if "id" in attributes}
        return [reference for reference in found if reference.removeprefix("#") not in ids]
