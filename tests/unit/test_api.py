"""The Python interface: its examples, the images of ``diffmoe sample``, and errors that name the arguments."""

from __future__ import annotations

import argparse
import doctest
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import diffmoe_ds
from diffmoe_ds import api, api_samples
from diffmoe_ds.api_arguments import SamplingOptions, overrides_of
from diffmoe_ds.checkpoint import reference
from diffmoe_ds.cli import main
from diffmoe_ds.distributed.launch import EXPORTED
from diffmoe_ds.errors import CheckpointError, ConfigError, DiffMoEError, Requeue
from tests.helpers.processes import REPOSITORY
from tests.helpers.sampling import write_random_model


@pytest.fixture
def demo(run_directory, tmp_path, monkeypatch):
    """Change to a directory with the run ``runs/demo``."""
    shutil.copytree(run_directory, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return "runs/demo"


@pytest.mark.parametrize("module", (diffmoe_ds, api, api_samples))
def test_the_examples_run(demo, module):
    model = diffmoe_ds.load(demo)
    names = {"diffmoe_ds": diffmoe_ds, "model": model, "samples": model.sample(seeds=[0], steps=1)}
    found = doctest.testmod(module, globs=names)
    assert found.failed == 0 and found.attempted >= 3, module


def test_the_code_of_the_page_runs(demo):
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec("".join(blocks).replace("10_000", "64").replace("steps=50", "steps=2"), names)
    assert names["samples"].labels.tolist() == [8, 3] * 4 and names["velocity"].shape == (2, 1, 32, 32)
    assert names["model"].trained_images == 64 and os.path.isfile("bag.png")
    for function in (diffmoe_ds.load, diffmoe_ds.fit, diffmoe_ds.Model.sample):
        options = SamplingOptions.__annotations__ if function is diffmoe_ds.Model.sample else {}
        for argument in {*inspect.signature(function).parameters, *options} - {"self", "options"}:
            assert f"\n| `{argument}` |" in page


def test_the_example_of_the_reference_runs():
    with np.load(REPOSITORY / "tests" / "golden" / "diffmoe_flow.npz") as file:
        names = {name: torch.from_numpy(file[f"in/{name}"]) for name in "xty"}
        state = {key[6:]: torch.from_numpy(file[key]) for key in file if key.startswith("state/")}
        names |= {"config": json.loads(str(file["config"])), "state": state}
    found = doctest.testmod(reference, extraglobs=names)
    assert found.failed == 0 and found.attempted == 3


def test_every_public_name_has_an_example_and_a_type():
    for name in set(diffmoe_ds.__all__) - {"__version__"}:
        assert ">>>" in getattr(diffmoe_ds, name).__doc__, name
    assert ">>>" in api.Model.sample.__doc__ and ">>>" in api_samples.Samples.to_pil.__doc__
    assert {*diffmoe_ds.__all__, "api"} <= {*dir(diffmoe_ds)}
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


def test_a_model_without_classes_and_only_averaged_weights(tmp_path):
    folder = write_random_model(tmp_path / "model", overrides=["model.num_classes=1"])
    model = diffmoe_ds.load(folder)
    assert model.sample(classes=[0], seeds=[1], steps=1).labels.tolist() == [0]
    with pytest.raises(ConfigError, match=r"classes \['cat'\]: the model was trained without classes; omit the arg"):
        model.sample(classes=["cat"])
    with pytest.raises(CheckpointError, match="holds only ema weights; use weights ema"):
        diffmoe_ds.load(folder, weights="raw")


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
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer, got 1.5"),
        ({"classes": 3}, "classes must be a list of labels or names, got 3"),
        ({"classes": []}, "classes must be a list of labels or names, got []"),
        ({"classes": {1, 2}}, "classes must be a list of labels or names, got {1, 2}"),
        ({"seeds": {1, 2}}, "such as range(8), got {1, 2}"),
        ({"seeds": "12"}, "got '12'"),
        ({"cfg_scale": "2"}, "cfg_scale must be a finite number of at least 0, got '2'"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number of at least 0, got nan"),
        ({"capacity": "1"}, "capacity must be a finite number, got '1'"),
        ({"cfg_scale": 10**400}, "cfg_scale must be a finite number of at least 0, got 1000"),
        ({"cfg_scale": 10**5000}, "got <int of thousands of digits>"),
        ({"capacity": Fraction(10**400, 3)}, "capacity must be a finite number, got Fraction"),
        ({"steps": 10**30}, "steps must be at most 100,000, got 1000"),
        ({"batch_size": 10**30}, "batch_size must be at most 65,536, got 1000"),
        ({"seeds": itertools.count()}, "seeds must be at most 10,000,000, got more"),
        ({"classes": range(10**12)}, "classes must be at most 10,000,000, got 1,000,000,000,000"),
        ({"classes": [10**5000]}, "classes: '<int of thousands of digits>' is not known"),
    ):
        with pytest.raises(ConfigError) as error:
            model.sample(**{"steps": 1, **arguments})
        assert message in str(error.value) and "--" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"^nowhere: not a checkpoint, run directory or exported model\.$"):
        diffmoe_ds.load("nowhere")
    os.makedirs("pipeline/transformer")
    open("pipeline/model_index.json", "w").close()
    hints = {
        "a.pt": "`diffmoe checkpoint import-official`",
        "pipeline": "DiffusionPipeline",
        "pipeline/transformer": "DiffusionPipeline",
    }
    for path, hint in hints.items():
        with pytest.raises(CheckpointError, match=f"^{path}: not a checkpoint, .* exported model; .*{hint}"):
            diffmoe_ds.load(path)
    with pytest.raises(ConfigError, match="path must be a run directory, a checkpoint or an exported model, got None"):
        diffmoe_ds.load(None)
    for name in ("weights", "dtype"):
        with pytest.raises(ConfigError, match=f"{name}: 'best' is not known; valid:"):
            diffmoe_ds.load(demo, **{name: "best"})
        with pytest.raises(ConfigError, match=f"{name}: .* is not known; "):
            diffmoe_ds.load(demo, **{name: ["ema"]})
    for device in ("gpu", "cuda:99", "meta2", 2**70):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: "):
            diffmoe_ds.load(demo, device=device)
    with pytest.raises(ConfigError, match=r"vae x: the model generates pixels \(1 channel\); omit it"):
        diffmoe_ds.load(demo, vae="x")


def test_numbers_of_other_types_are_those_of_python(demo):
    model = diffmoe_ds.load(demo)
    expected = model.sample(seeds=range(2), steps=1, cfg_scale=1.5, capacity=1.5, batch_size=2)
    found = model.sample(
        seeds=range(2), steps=1, cfg_scale=Fraction(3, 2), capacity=Fraction(3, 2), batch_size=np.uint8(2)
    )
    assert (found.images == expected.images).all()


NESTED: dict = {}
NESTED["run"] = NESTED


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"settings": NESTED}, "settings cannot be written as JSON: nested too deeply"),
        ({"settings": {"data.path": [{(1, 2): 3}]}}, "settings cannot be written as JSON: keys must be str"),
        ({"settings": {"run.seed": 10**5000}}, "settings cannot be written as JSON: Exceeds the limit"),
        ({"recipe": None}, "recipe must be the name of a recipe or a YAML file, got None"),
        ({"run_dir": 5}, "run_dir must be a path, got 5"),
        ({"run_dir": "a\0b"}, r"run_dir must be a path, got 'a\x00b'"),
        ({"run_dir": "\ud800"}, r"run_dir must be a path, got '\ud800'"),
        ({"settings": {"run.total_images": -1}}, "settings: run.total_images must be positive"),
        ({"settings": {"run": {"total_images": -1}}}, "settings: run.total_images must be positive"),
        ({"settings": {"run": {"totl_images": 1}}}, "settings: run.totl_images: 'totl_images' is not known"),
        ({"recipe": "fashon"}, "recipe: 'fashon' is not known; did you mean 'fashion'?"),
        ({"deepspeed_config": "zero9"}, "deepspeed_config: 'zero9' is not known"),
        ({"run_dir": "runs/demo", "resume": "none"}, "use another run_dir, or use resume auto"),
        ({"resume": "nowhere"}, "resume nowhere: not a checkpoint"),
        ({"resume": True}, 'resume must be "auto", "none" or a path, got True'),
        ({"settings": ["run.seed=1"]}, "settings must be a dict such as"),
        ({"settings": {"model": {"name": "nano-E4"}, "model.name": "tiny-E4"}}, "settings: model.name is set twice"),
        ({"settings": {"run": None}}, "settings run=null: run is a section; set its keys"),
        ({"deepspeed_config": {"train_batch_size": 8}}, 'pass a dict as settings={"deepspeed": ...}'),
    ),
)
def test_mistakes_of_fit_name_the_arguments(demo, arguments, message):
    with pytest.raises(DiffMoEError) as error:
        diffmoe_ds.fit(**arguments)
    assert message in str(error.value) and "--" not in str(error.value)


def test_nested_settings_change_only_their_keys():
    assert overrides_of({"run": {"seed": 1, "total_images": 64}, "model.name": "nano-E4"}) == [
        "run.seed=1", "run.total_images=64", 'model.name="nano-E4"',
    ]  # fmt: skip


@pytest.mark.parametrize("convert", (np.array, torch.tensor, lambda values: [torch.tensor(v) for v in values]))
def test_classes_and_seeds_may_be_arrays_and_tensors(demo, convert):
    model = diffmoe_ds.load(demo)
    samples = model.sample(classes=convert([1, 2]), seeds=convert([5, 6]), steps=1)
    assert np.array_equal(samples.images, model.sample(classes=[1, 2], seeds=[5, 6], steps=1).images)
    assert samples.labels.tolist() == [1, 2]


def test_a_fit_interrupted_before_the_first_step_has_no_model(demo, monkeypatch, capsys):
    def interrupted(args: argparse.Namespace) -> None:
        (args.run_dir / "checkpoints").mkdir(parents=True)
        raise Requeue("asked to stop (SIGINT)")

    monkeypatch.setattr("diffmoe_ds.cli.train.train_command", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffmoe_ds.fit(run_dir="runs/none")
    assert "asked to stop (SIGINT)" in capsys.readouterr().out


def test_an_interrupted_fit_saves_and_goes_on(demo, capsys):
    """The handlers of the notebook are restored."""
    before, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    environment = {name: os.environ.get(name) for name in EXPORTED}
    settings = {"run.total_images": 16_000, "model.name": "nano-E4", "run.sample_every_images": 0}

    def interrupt() -> None:
        while not os.path.isfile("runs/tiny/metrics.jsonl") or not os.path.getsize("runs/tiny/metrics.jsonl"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    model = diffmoe_ds.fit("fashion", settings, run_dir="runs/tiny")
    images = model.trained_images
    assert 0 < images < 16_000 and "asked to stop (SIGINT)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before and sys.excepthook is hook
    assert {name: os.environ.get(name) for name in EXPORTED} == environment
    longer = diffmoe_ds.fit("fashion", {**settings, "run.total_images": images + 64}, run_dir="runs/tiny")
    assert longer.trained_images == images + 64
