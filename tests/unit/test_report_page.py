"""``diffmoe report``: which figures a run gets, a page that needs no other file, and errors."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.evaluation.report import style
from tests.helpers.reports import ReadPage, report_config, write_run

QUICK = ("--images", "7", "--steps", "3", "--batch-size", "4")
TRAINING = ["loss", "grad_norm", "lr", "images_per_s"]
VALIDATION = ["validation_loss", "validation_by_noise_level", "frechet"]
SAMPLES = ["samples_by_class", "samples_by_guidance"]
COMPUTE = [
    "compute_per_token", "capacity_by_noise_level", "capacity_by_layer", "capacity_by_class", "experts_taken",
    "hardest_and_easiest_classes",
]  # fmt: skip
THRESHOLDS = ["thresholds_block_01", "thresholds_block_03"]


def report(run: Path, out: Path, *options: str) -> ReadPage:
    """Make a report in this process; check its files, and return the page."""
    assert main(["report", str(run), "--out", str(out), *QUICK, *options]) == 0
    page = ReadPage(out / "report.html")
    files = {path.stem: path.read_bytes() for path in (out / "figures").iterdir()}
    assert set(page.figures()) == set(files) and {p.name for p in out.iterdir()} == {"report.html", "figures"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    prefix = "data:image/png;base64,"
    assert [base64.b64decode(source.removeprefix(prefix)) for source in sources] == [
        files[name] for name in page.figures()
    ]
    for path in (out / "figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 100
    return page


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """Rendering at full resolution would be a third of the time of these tests."""
    monkeypatch.setattr(style, "DPI", 80)


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", report_config("batch_pool"))


def test_a_complete_run(tmp_path):
    """Its page needs no other file and no script, and everything from the run is escaped."""
    run = write_run(tmp_path / "<i>&'run", report_config("batch_pool"))
    page = report(run, tmp_path / "out")
    expected = [*TRAINING, *VALIDATION, *SAMPLES, *COMPUTE, "load_per_expert", *THRESHOLDS]
    assert page.figures() == expected
    assert f"diffmoe report {shlex.quote(str(run))} --out {tmp_path / 'out'} --images 7" in page.text
    for fact in ("per_token", "96 images", "euler, 3 steps", "7 images of 3 classes, 3 steps each", "nano-E4"):
        assert fact in page.text
    assert "The checkpoint is from" not in page.text and "outside the run" not in page.text
    assert "10 images generated with the EMA weights at each evaluation, against 1,234 held-out images" in page.text
    assert "exceeds its threshold." in page.text
    assert all(reference.startswith("data:") for reference in page.references())
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed")]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert "<b>boot</b>" in page.text and "<i>&'run" in page.text
    assert not {"i"} & {tag for tag, _ in page.tags} and all(not a for tag, a in page.tags if tag == "b")


@pytest.mark.parametrize(
    ("kind", "compute", "sentence"),
    (
        ("dense", None, "The model is dense"),
        ("token_choice", [], "Every token takes 1 expert: compute is the same everywhere."),
        ("expert_choice", [c for c in COMPUTE if c not in ("capacity_by_noise_level", "capacity_by_layer",
          "capacity_by_class", "hardest_and_easiest_classes")], "a fixed number of tokens from each image"),
    ),
)  # fmt: skip
def test_other_routers(tmp_path, kind, compute, sentence):
    page = report(write_run(tmp_path / "run", report_config(kind), is_logged=False), tmp_path / "out")
    routing = [] if compute is None else compute if kind == "expert_choice" else [*compute, "load_per_expert"]
    final = ["thresholds"] if kind == "expert_choice" else []  # without TensorBoard files: those of the checkpoint
    assert page.figures() == [*TRAINING, *SAMPLES, *routing, *final]
    assert sentence in page.text and "no validation loss" in page.text


def test_latents_ddpm_one_row_and_an_unfinished_run(tmp_path):
    config = report_config("batch_pool", "ddpm", in_channels=4, label_dropout=0.0, num_classes=1000)
    run = write_run(tmp_path / "run", config, rows=1, images=24, is_logged=False)
    page = report(run, tmp_path / "out", "--routing", "dynamic", "--num-classes", "4", "--seed", "9")
    assert {*TRAINING, "samples_by_class", "compute_per_token"} <= set(page.figures())
    assert "samples_by_guidance" not in page.figures()
    for sentence in (
        "images show their first three channels",
        "25% of the planned training (24 of 96 images)",
        "does not support classifier-free guidance",
        "0 <b>boot</b>, 250, 500, 750",
        "9 to 10, the same for every class",
        "takes as many tokens as have a predicted probability above its threshold.",
    ):
        assert sentence in page.text


@pytest.mark.parametrize("sign", (1, -1))
def test_extreme_numbers_in_the_logs_do_not_stop_the_report(run, tmp_path, sign):
    row = {"images": 16, "images_per_s": 5e-324, "loss": sign * 1e308, "grad_norm": 5e-324, "lr": 1e-3}
    rows = [row, {**row, "images": 1e308}, {**row, "images": 32, "loss": -sign * 1e308, "grad_norm": 1e308}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"validation_loss": 1e308, "validation_loss_by_noise_level": [sign * 1e308, -1e308, 5e-324]}
    rows = [{"images": images, **held_out, "metrics": {"frechet": 1e308, "n": 1e308}} for images in (16, 32)]
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "lr" in report(run, tmp_path / "out").figures()


def test_class_names_that_are_not_unicode_are_drawn_as_escapes(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(run / "model.safetensors", model)
    tree = json.loads((run / "config.json").read_text())
    names = [f"\udcff{label}" for label in range(tree["config"]["model"]["num_classes"])]
    (model / "config.json").write_text(json.dumps({**tree, "class_names": names}))
    assert "udcff" in report(model, tmp_path / "out").text


def test_a_model_without_logs_and_chosen_classes(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(run / name, model)
    page = report(model, tmp_path / "out", "--classes", "coat", "--capacity", "2")
    assert "7 images of 1 class" in page.text
    assert "use other thresholds, calibrated to 2 experts per token." in page.text
    assert "loss" not in page.figures() and "no curves" in page.text
    assert "capacity_by_class" not in page.figures(), "there is one class"
    adaptive = ("--sampler", "dopri5", "--rtol", "0.1", "--atol", "0.1")
    page = report(run, tmp_path / "other", "--checkpoint", str(model), "--cfg-scale", "1", *adaptive)
    assert "loss" in page.figures() and str(model / "model.safetensors") in page.text
    assert "adaptive steps each" in page.text


def test_static_routing_does_not_depend_on_the_thresholds(run, tmp_path):
    page = report(run, tmp_path / "out", "--routing", "static")
    assert "do not depend on the thresholds: their routing is static." in page.text
    assert "exceeds its threshold" not in page.text


def test_one_image_and_one_step(run, tmp_path):
    page = report(run, tmp_path / "out", "--images", "1", "--steps", "1")
    assert "1 image of 1 class, 1 step." in page.text and "at 1 noise level." in page.text
    assert "seeds0classes0 <b>boot</b>" in "".join(page.text.split("\n")), "neither other seeds nor other classes"


def test_a_checkpoint_from_elsewhere(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", report_config("batch_pool"), images=48)
    config = (run / "resolved.yaml").read_text()
    (run / "resolved.yaml").write_text(config.replace("total_images: 96", "total_images: 960"))
    page = report(run, tmp_path / "out", "--checkpoint", str(other))
    assert f"table are of the run {run}; the model and its images are from {other / 'model.safetensors'}" in page.text
    assert "960 images" in page.text, "the planned length of the run"
    report(run, tmp_path / "same", "--checkpoint", str(run))
    assert "outside the run" not in (tmp_path / "same" / "report.html").read_text()
    dense = write_run(tmp_path / "dense", report_config("dense"), is_logged=False)
    assert main(["report", str(run), "--checkpoint", str(dense), "--out", str(tmp_path / "no"), *QUICK]) == 5
    assert "belongs to another model: routing." in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_run_without_a_checkpoint(run, tmp_path):
    (run / "model.safetensors").unlink()
    page = report(run, tmp_path / "out")
    assert page.figures() == [*TRAINING, *VALIDATION] and "no checkpoint yet" in page.text


def test_a_trained_run(run_directory, tmp_path):
    page = report(run_directory, tmp_path / "out")
    assert {"loss", "compute_per_token", "samples_by_class"} <= set(page.figures())
    for fact in ("T-shirt/top", "ZeRO stage", "global batch", "embedded Fashion-MNIST", "images_000000000096"):
        assert fact in page.text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    (
        (("--images", "0"), 2, "--images must be positive, got 0."),
        (("--num-classes", "0"), 2, "--num-classes must be positive, got 0."),
        (("--seed", "-1"), 2, "--seed must be from 0 to"),
        (("--num-classes", "9"), 2, "--num-classes must be from 1 to 3 for this model, got 9."),
        (("--num-classes", "3", "--images", "2"), 2, "--images must be at least the number of classes, 3, got 2."),
        (("--classes", "0,1", "--images", "1"), 2, "--images must be at least the number of classes, 2, got 1."),
        (("--classes", "3"), 2, "--classes must be from 0 to 2"),
        (("--sampler", "ddim"), 2, "--sampler must be"),
        (("--weights", "raw"), 2, "--weights raw: "),
        (("--capacity", "9"), 2, "--capacity must be positive and at most the number of experts, 4, got 9."),
        (("--routing", "sideways"), 2, "'sideways'"),
        (("--vae", "anything"), 2, "the model generates pixels (1 channels); omit --vae."),
        (("--checkpoint", "nowhere"), 5, "--checkpoint nowhere: not a checkpoint"),
    ),
)
def test_errors_are_one_sentence_and_write_nothing(run, tmp_path, capsys, options, code, message):
    out = tmp_path / "out"
    assert main(["report", str(run), "--out", str(out), *options]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("diffmoe: error: ") and message in error
    assert not out.exists() or not list(out.iterdir())


def test_paths_that_cannot_be_used(run, tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 5
    assert "nowhere: not a checkpoint, run directory or exported model." in capsys.readouterr().err
    options = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert main(["report", str(tmp_path / "nowhere"), *options]) == 2
    assert "nowhere is not a run directory." in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "resolved.yaml")]) == 5
    assert "cannot create the directory: File exists." in capsys.readouterr().err


def test_images_with_nan_are_refused(run, tmp_path, capsys):
    description = json.loads((run / "config.json").read_text())
    description["config"]["objective"]["flow_time_scale"] = 1e300
    (run / "config.json").write_text(json.dumps(description))
    assert main(["report", str(run), "--out", str(tmp_path / "out"), *QUICK]) == 3
    assert "the generated images contain NaN or Inf" in capsys.readouterr().err
