"""``diffmoe init``: what it finds in folders and shards, and recipes that train on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.cli.init_recipe import Facts, Initial, draft
from diffmoe_ds.config.load import load_config
from tests.helpers.data import npy, numbered_shard, tiny_vae, write_tar
from tests.helpers.encoders import tiny_encoder


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(folder: str, mode: str = "RGB", size: tuple[int, int] = (90, 70), count: int = 5) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(Path(folder) / f"{number}.png")


def init(*arguments: str, code: int = 0) -> None:
    assert main(["init", *arguments]) == code


def test_a_folder_of_classes(capsys):
    for name in ("cat", "dog", "wild boar"):
        pictures(f"my pets/{name}")
    init("my pets", "--out", "pets.yaml")
    output = capsys.readouterr().out
    assert "15 images in 3 classes, 70 to 90 pixels, color" in output and "diffmoe train --config pets.yaml" in output
    assert "num_classes: 3  # cat, dog, wild boar\n" in Path("pets.yaml").read_text()
    config = load_config("pets.yaml")
    assert (config.model.input_size, config.model.in_channels, config.model.num_classes) == (64, 3, 3)
    assert config.tokens_per_image == 64 and config.data.path == str(Path("my pets").resolve())
    length = ["run.total_images=64", "deepspeed.train_batch_size=16", "sample.steps=1", "model.name=nano-E4"]
    assert main(["train", "--config", "pets.yaml", "--set", *length]) == 0
    assert Path("runs/pets/checkpoints/images_000000000064").is_dir()


def test_a_folder_with_captions(capsys):
    pictures("photos")
    for number in range(5):
        Path("photos", f"{number}.txt").write_text(f"a {'red' if number % 2 else 'blue'} car\n")
    encoder = str(tiny_encoder("bert"))
    init("photos", "--text-encoder", encoder)
    config = load_config("photos.yaml")
    assert config.model.conditioning == "text" and config.data.text_encoder == (encoder,)
    assert (config.sample.num_images, config.sample.cfg_scale) == (32, 3)
    assert '--prompt "..." --cfg-scale 3.0' in Path("photos.yaml").read_text()
    length = ["run.total_images=16", "deepspeed.train_batch_size=16", "sample.steps=1", "model.name=nano-E4"]
    assert main(["train", "--config", "photos.yaml", "--set", *length]) == 0
    assert Path("runs/photos/checkpoints/images_000000000016").is_dir()
    init("photos", "--text-encoder", encoder, "--init-from", "runs/photos", "--out", "no.yaml", code=2)
    assert "--text-encoder and --init-from cannot be combined" in capsys.readouterr().err


def test_formats_that_are_not_read_are_counted(capsys):
    for name in ("cat", "dog"):
        pictures(f"pets/{name}")
    for name in ("cat/a.HEIC", "cat/b.avif", "dog/c.heic", "dog/notes.txt"):
        Path("pets", name).write_bytes(b"x")
    init("pets")
    assert "3 files (.avif, .heic) cannot be read and are left out; convert them" in capsys.readouterr().err
    for file in Path("pets/dog").glob("*.png"):
        file.unlink()
    Path("pets.yaml").unlink()
    init("pets", code=4)
    assert "class folder pets/dog holds no images; convert its .heic files" in capsys.readouterr().err


def test_small_grayscale_images_without_classes():
    pictures("digits", "L", (28, 28))
    init("digits")
    config = load_config("digits.yaml")
    assert (config.model.input_size, config.model.in_channels, config.model.num_classes) == (32, 1, 1)
    assert config.sample.cfg_scale == 1 and main(["train", "--config", "digits.yaml", "--dry-run"]) == 0


def test_shards_keep_their_size(capsys):
    numbered_shard(Path("numbers.tar"), 20)
    init("numbers.tar", "--out", "numbers.yaml")
    config = load_config("numbers.yaml")
    assert (config.model.input_size, config.model.in_channels, config.model.num_classes) == (32, 1, 4)
    assert main(["train", "--config", "numbers.yaml", "--dry-run"]) == 0
    init("numbers.tar", "--out", "other.yaml", "--size", "24", code=2)
    assert "have up to 28 pixels, and images in shards are not resized" in capsys.readouterr().err


def test_latents(capsys):
    pictures("photos")
    tiny_vae(Path("vae"))
    init("photos", "--vae", "vae", "--size", "64", "--out", "online.yaml")
    online = load_config("online.yaml")
    assert (online.model.in_channels, online.model.input_size) == (4, 16) and online.data.vae == str(
        Path("vae").resolve()
    )
    assert main(["train", "--config", "online.yaml", "--dry-run"]) == 0
    arguments = ["--images", "photos", "--vae", "vae", "--size", "32", "--out", "latents"]
    assert main(["prepare", "latents", *arguments]) == 0
    init("latents")
    prepared = load_config("latents.yaml")
    assert (prepared.model.in_channels, prepared.model.input_size, prepared.data.vae) == (4, 8, None)
    init("latents", "--size", "32", "--out", "x.yaml", code=2)
    assert "--size 32: latents holds latents; omit it" in capsys.readouterr().err


def test_latents_of_other_tools():
    latent = npy(np.zeros((4, 8, 8), np.float32))
    damaged = ("a.npy", b"no array")
    write_tar(Path("damaged.tar"), [damaged, ("a.cls", b"0"), ("b.npy", latent), ("b.cls", b"1")])
    init("damaged.tar", "--out", "damaged.yaml")
    assert load_config("damaged.yaml").model.in_channels == 4
    write_tar(Path("plain.tar"), [("a.npy", latent), ("a.cls", b"0"), ("b.npy", latent), ("b.cls", b"1")])
    init("plain.tar", "--out", "plain.yaml")
    config = load_config("plain.yaml")
    assert (config.model.in_channels, config.model.input_size, config.data.vae) == (4, 8, None)
    assert main(["train", "--config", "plain.yaml", "--dry-run"]) == 0


def test_mistakes_write_nothing(capsys):
    pictures("photos")
    Path("photos.yaml").write_text("mine")
    Path("empty").mkdir()
    Path("broken").mkdir()
    pictures("nested/a/b")
    Path("broken/a.jpg").write_bytes(b"no picture")
    for arguments, code, message in (
        (["photos"], 2, "photos.yaml exists already"),
        (["photos", "--out", "x.yml"], 2, "must end in .yaml"),
        (["photos", "--size", "60", "--out", "x.yaml"], 2, "--size must be a positive multiple of 8, got 60"),
        (["empty"], 4, "holds no images"),
        (["photos/0.png"], 4, "photos/0.png is a single image; give the folder that holds it, photos"),
        (["nowhere"], 4, "nowhere does not exist; expected a folder of images, or shards"),
        (["broken"], 4, "none of the images can be read; image broken/a.jpg cannot be decoded: it does not start"),
        (["nested"], 4, "use nested/a itself, or move them; `diffmoe prepare images --unlabelled` takes all images"),
        (["photos", "--out", "missing/x.yaml"], 5, "missing/x.yaml: cannot be written"),
    ):
        init(*arguments, code=code)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert Path("photos.yaml").read_text() == "mine" and {path.suffix for path in Path().glob("*.y*ml")} == {".yaml"}


def test_an_unreadable_image_is_named(capsys):
    pictures("photos")
    Path("photos/z.jpg").write_bytes(b"no picture")
    init("photos")
    output, error = capsys.readouterr()
    assert "image photos/z.jpg cannot be decoded: it does not start like an image file\n" in error
    assert "1 of the 6 images that were read; " in error and "stops if they are more than 1% of all" in error
    assert "next  repair or remove unreadable images, or raise data.max_unreadable; then diffmoe train" in output


def test_the_command_in_a_recipe_names_the_run_of_train():
    """Whatever the folder of the recipe."""
    pictures("photos")
    Path("recipes").mkdir()
    init("photos", "--out", "recipes/one.yaml")
    assert "--checkpoint runs/one --cfg-scale" in Path("recipes/one.yaml").read_text()


@pytest.mark.parametrize("gpu_gb", (None, 16.0, 80.0))
@pytest.mark.parametrize(("channels", "size"), ((1, 32), (3, 256), (4, 32)))
@pytest.mark.parametrize(("images", "classes"), ((2, 1), (200, 3), (1_281_167, 1000)))
def test_every_draft_is_a_valid_recipe(gpu_gb, channels, size, images, classes):
    names = [f"class: {number} #'\"" for number in range(classes)]
    facts = Facts("da ta/{0..3}.tar", "title", images, classes, names, channels, size, None, gpu_gb, "r.yaml")
    Path("r.yaml").write_text(draft(replace(facts, text_encoder="google/flan-t5-base")))
    config = load_config("r.yaml")
    assert config.model.conditioning == "text" and config.data.text_encoder == ("google/flan-t5-base",)
    Path("r.yaml").write_text(draft(facts))
    config = load_config("r.yaml")
    assert config.data.path == "da ta/{0..3}.tar" and config.model.num_classes == classes
    tokens = 1024 if (size, channels) == (256, 3) else 64 if gpu_gb is None else 256
    assert config.tokens_per_image == tokens and config.ema.initial_share(10_000) < 0.01
    assert 0 < config.run.save_every_images < config.run.total_images


def test_a_model_to_fine_tune(run_directory, capsys):
    """The recipe leaves the architecture to the model; images are converted to its size and channels."""
    pictures("pets/cat")
    pictures("pets/dog")
    init("pets", "--init-from", str(run_directory), "--out", "tuned.yaml")
    assert "the model of --init-from is grayscale: the images lose their color" in capsys.readouterr().err
    text = Path("tuned.yaml").read_text()
    assert "# weights and architecture: nano-E4, 32x32, grayscale" in text and "flow_time_scale" not in text
    assert load_config("tuned.yaml").optimizer.lr < 1e-3
    short = ["run.total_images=16", "deepspeed.train_batch_size=16", "sample.steps=1"]
    assert main(["train", "--config", "tuned.yaml", "--set", *short]) == 0
    assert "starting from the weights of" in capsys.readouterr().out
    init("pets", "--init-from", str(run_directory), "--size", "64", "--out", "no.yaml", code=2)
    assert "--size 64: the model of --init-from" in capsys.readouterr().err
    init("pets", "--init-from", "nowhere", "--out", "no.yaml", code=5)
    assert "--init-from nowhere: not a checkpoint" in capsys.readouterr().err and not Path("no.yaml").exists()


@pytest.mark.parametrize("initial", (None, Initial("runs/ddpm", "S-E8", "ddpm", False)))
@pytest.mark.parametrize("gpu_gb", (None, 16, 80))
@pytest.mark.parametrize(("size", "channels"), ((32, 1), (32, 3), (56, 3), (64, 3), (128, 3), (256, 3), (32, 4)))
def test_a_token_can_carry_its_patch(gpu_gb, size, channels, initial):
    """Narrower ones cannot predict the noise: images of 8x8 color patches at width 96 stayed noise."""
    facts = Facts(
        path="images", title="images", num_images=200, num_classes=3, class_names=(), channels=channels, size=size,
        vae=None, gpu_gb=gpu_gb, file="r.yaml", initial=initial,
    )  # fmt: skip
    Path("r.yaml").write_text(draft(facts))
    config = load_config("r.yaml")
    if initial is None:
        model = config.model
        assert model.patch_size**2 * channels <= 0.75 * config.size.hidden_size
        assert model.input_size // model.patch_size >= (8 if gpu_gb is None else 16)
        assert config.tokens_per_image <= 1024
    else:
        assert config.sample.cfg_scale == 1 and config.sample.sampler == "ddim", "no label dropout, no guidance"
    assert config.run.total_images == (30_000 if gpu_gb is None else 200_000), "a small set is not copied for hours"


def test_the_output_of_a_command_is_not_a_path():
    shards = "pipe:cat shards.tar"
    pictures("images/a")
    assert main(["prepare", "images", "--images", "images", "--size", "32", "--out", "prepared"]) == 0
    next(Path("prepared").glob("*.tar")).rename("shards.tar")
    init(shards, "--out", "piped.yaml")
    assert load_config("piped.yaml").data.path == shards


@pytest.mark.parametrize("key", ("scaling_factor", "shift_factor"))
def test_a_vae_whose_numbers_no_float_holds_is_refused(key, capsys):
    pictures("images/a")
    vae = Path(tiny_vae(Path("vae")))
    tree = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**tree, key: 10**400}))
    init("images", "--vae", str(vae), "--size", "256", code=2)
    assert f"has an invalid {key} in its config.json: 1000" in capsys.readouterr().err
