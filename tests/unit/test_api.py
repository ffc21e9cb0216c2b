"""The Python interface: its examples, the images of ``diffmoe sample``, and errors that name the arguments."""

from __future__ import annotations

import doctest
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import diffmoe_ds
from diffmoe_ds import api
from diffmoe_ds.cli import main
from diffmoe_ds.errors import CheckpointError, ConfigError


@pytest.fixture
def demo(run_directory, tmp_path, monkeypatch):
    """Change to a directory with the run ``runs/demo``."""
    shutil.copytree(run_directory, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return "runs/demo"


@pytest.mark.parametrize("module", (diffmoe_ds, api))
def test_the_examples_run(demo, module):
    names = {"diffmoe_ds": diffmoe_ds, "model": diffmoe_ds.load(demo)}
    found = doctest.testmod(module, globs=names)
    assert found.failed == 0 and found.attempted >= 3


def test_every_public_name_has_an_example_and_a_type():
    for name in set(diffmoe_ds.__all__) - {"__version__", "load_official"}:
        assert ">>>" in getattr(diffmoe_ds, name).__doc__, name
    assert ">>>" in api.Model.sample.__doc__
    assert diffmoe_ds.__version__.count(".") == 2
    assert os.path.isfile(os.path.join(os.path.dirname(diffmoe_ds.__file__), "py.typed"))
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        diffmoe_ds.train_it  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "options"),
    (
        ({}, []),
        ({"cfg_scale": 2.0, "sampler": "heun"}, ["--cfg-scale", "2", "--sampler", "heun"]),
        ({"capacity": 0.5}, ["--capacity", "0.5"]),
        ({"routing": "static", "batch_size": 4}, ["--routing", "static", "--batch-size", "4"]),
    ),
)
def test_the_images_are_those_of_the_command(demo, arguments, options):
    model = diffmoe_ds.load(demo)
    samples = model.sample(classes=["Bag", 3], seeds=range(5, 11), steps=2, **arguments)
    command = ["sample", "--checkpoint", demo, "--classes", "Bag,3", "--seed", "5", "--num-images", "6", "--steps", "2"]
    assert main([*command, "--out", "out", *options]) == 0
    with np.load("out/samples.npz") as file:
        assert np.array_equal(file["arr_0"], samples.images) and np.array_equal(file["arr_1"], samples.labels)
    again = model.sample(seeds=[5], steps=2).images
    assert np.array_equal(again, diffmoe_ds.load(demo).sample(seeds=[5], steps=2).images), "settings do not stay"
    assert samples._repr_png_().startswith(b"\x89PNG") and samples.to_pil()[0].mode == "L"


def test_what_sessions_print_and_show(demo):
    model = diffmoe_ds.load(demo)
    assert repr(model) == "Model(nano-E4, 32x32x1, 10 classes, trained on 96 images)"
    samples = model.sample(classes=["Bag", 3], seeds=range(4), steps=1)
    assert repr(samples) == "Samples(4 images, 32x32x1)"
    for shown, columns in ((samples, 2), (replace(samples, labels=samples.labels[[0, 0, 0, 1]]), 2)):
        with Image.open(BytesIO(shown._repr_png_())) as picture:
            assert picture.width % (34 * columns + 2) == 0
            assert (picture.height > picture.width) == (shown is samples), "names above the columns of classes"


def test_mistakes_are_named(demo):
    model = diffmoe_ds.load(demo)
    for arguments, message in (
        ({"classes": ["Bga"]}, "classes: 'Bga' is not known; did you mean 'bag'?"),
        ({"classes": [10]}, "classes must be from 0 to 9 for this model, got 10"),
        ({"classes": "Bag"}, "classes must be a list of labels or names, got 'Bag'"),
        ({"seeds": []}, "seeds must be one or more integers from 0 to 2^64 - 1, such as range(8), got []"),
        ({"seeds": 8}, "got 8"),
        ({"seeds": [0.5]}, "got [0.5]"),
        ({"seeds": [-1]}, "got [-1]"),
        ({"steps": 0}, "steps must be a positive integer for the sampler euler, got 0"),
        ({"sampler": "ddim"}, "sampler"),
        ({"routing": "best"}, "'best' is not known"),
        ({"capacity": 99}, "capacity must"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ):
        with pytest.raises(ConfigError) as error:
            model.sample(**{"steps": 1, **arguments})
        assert message in str(error.value) and "--" not in str(error.value)
    with pytest.raises(CheckpointError, match="nowhere: not a checkpoint"):
        diffmoe_ds.load("nowhere")
    for name in ("weights", "dtype"):
        with pytest.raises(ConfigError, match=f"{name}: 'best' is not known; valid:"):
            diffmoe_ds.load(demo, **{name: "best"})
    with pytest.raises(ConfigError, match=r"run\.total_images must be positive"):
        diffmoe_ds.fit(settings={"run.total_images": -1})


def test_an_interrupted_fit_saves_and_goes_on(demo, capsys):
    """The handlers of the notebook are restored."""
    before = signal.getsignal(signal.SIGINT)
    settings = {"run.total_images": 16_000, "model.name": "nano-E4", "run.sample_every_images": 0}

    def interrupt() -> None:
        while not os.path.isfile("runs/tiny/metrics.jsonl") or not os.path.getsize("runs/tiny/metrics.jsonl"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    model = diffmoe_ds.fit("fashion", settings, run_dir="runs/tiny")
    images = model.trained_images
    assert 0 < images < 16_000 and "asked to stop (SIGINT)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    longer = diffmoe_ds.fit("fashion", {**settings, "run.total_images": images + 64}, run_dir="runs/tiny")
    assert longer.trained_images == images + 64
