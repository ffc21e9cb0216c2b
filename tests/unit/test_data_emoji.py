"""The emoji recipe: a synthetic package in the layout of emoji-datasource-google, unpacked and as .tgz."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from examples.emoji.captions import main_colour
from examples.emoji.prepare_emoji import main
from tests.helpers.data import image_file, tree

CATEGORIES = ("Symbols", "Flags", "Activities", "Component")


def package(folder: Path, change=lambda entries: entries) -> Path:
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for number in range(8):
        names = [f"1f60{number}.png", f"1f60{number}-1f3fb.png"]
        for shade, name in enumerate(names):
            pixels = np.zeros((64, 64, 4), np.uint8)
            pixels[16:48, 16:48] = (number * 30, shade * 255, 200, 255)
            (pictures / name).write_bytes(image_file(pixels))
        entry = {
            "name": f"FACE {number}", "image": names[0], "category": CATEGORIES[number % 4],
            "subcategory": f"part-{number}", "has_img_google": number != 4,
        }  # fmt: skip
        if number == 1:
            entry["skin_variations"] = {"1F3FB": {"image": names[1], "has_img_google": True}}
        entries.append(entry)
    (folder / "emoji.json").write_text(json.dumps(change(entries)))
    return folder


def test_pictures_labels_and_captions(tmp_path):
    made = package(tmp_path / "package")
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as tar:
        tar.add(made, "package")
    for number, path in enumerate((made, tmp_path, tmp_path / "emoji.tgz")):
        assert main([str(path), "--out", str(tmp_path / f"out-{number}")]) == 0
    assert tree(tmp_path / "out-0") == tree(tmp_path / "out-1") == tree(tmp_path / "out-2")
    dataset = ShardDataset(expand(tmp_path / "out-0"))
    labels = {dataset.key(i): dataset[i].label for i in range(len(dataset))}
    assert labels == {"1f600": 2, "1f601": 1, "1f602": 0, "1f605": 1, "1f606": 0}
    image = next(dataset[i].image for i in range(5) if dataset.key(i) == "1f602")
    assert image.shape == (3, 64, 64) and (image[:, 0, 0] == 255).all() and image[:, 32, 32].tolist() == [60, 0, 200]
    with tarfile.open(expand(tmp_path / "out-0")[0]) as tar:
        assert tar.extractfile("1f602.txt").read() == b"face 2"
    index = json.loads((tmp_path / "out-0" / "index.json").read_text())
    assert index["classes"] == ["Activities", "Flags", "Symbols"]


def test_skin_tones_are_included_on_request(tmp_path):
    made = package(tmp_path / "package")
    assert main([str(made), "--skin-tones", "--out", str(tmp_path / "out")]) == 0
    dataset = ShardDataset(expand(tmp_path / "out"))
    assert "1f601-1f3fb" in {dataset.key(i) for i in range(len(dataset))} and len(dataset) == 6


def test_captions_for_text_models(tmp_path):
    """Several captions per picture; pictures of the same drawing become one, with the captions of both."""

    def change(entries):
        pictures = tmp_path / "package/img/google/64"
        (pictures / "1f606.png").write_bytes((pictures / "1f602.png").read_bytes())
        entries[6]["short_names"] = ["happy_face", "face2"]
        return entries

    made = package(tmp_path / "package", change)
    assert main([str(made), "--text", "--categories", "Activities, Flags", "--out", str(tmp_path / "out")]) == 0
    with tarfile.open(expand(tmp_path / "out")[0]) as tar:
        texts = {name: tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")}
    assert texts == {
        "1f601.txt": "face 1\nface 1, flags",
        "1f605.txt": "face 5\nface 5, flags",
        "1f602.txt": "face 2\nface 2, activities\npurple face 2\nface 6\nhappy face\nface 6, activities\npurple face 6",
    }
    assert main([str(made), "--skin-tones", "--text", "--out", str(tmp_path / "tones")]) == 0
    with tarfile.open(expand(tmp_path / "tones")[0]) as tar:
        assert tar.extractfile("1f601-1f3fb.txt").read() == b"face 1, light skin tone"


def test_an_unknown_category(tmp_path, capsys):
    made = package(tmp_path / "package")
    parts = ["--categories", "part-2,part-5,Symbols", "--out", str(tmp_path / "parts")]
    assert main([str(made), *parts]) == 0
    dataset = ShardDataset(expand(tmp_path / "parts"))
    assert {dataset.key(i) for i in range(len(dataset))} == {"1f600", "1f602", "1f605"}
    assert main([str(made), "--categories", "Flag", "--out", str(tmp_path / "out")]) == 2
    assert "--categories: 'Flag' is not known; did you mean 'Flags'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((220, 30, 40), "red"), ((240, 140, 20), "orange"), ((250, 220, 60), "yellow"), ((40, 160, 60), "green"),
        ((40, 90, 220), "blue"), ((130, 60, 200), "purple"), ((240, 90, 170), "pink"), ((120, 70, 40), "brown"),
        ((20, 20, 20), "black"), ((250, 250, 250), "white"), ((150, 150, 150), "gray"),
    ],
)  # fmt: skip
def test_words_for_colours(colour, word):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:5] = (*colour, 255)  # the transparent rest does not count
    assert main_colour(pixels) == word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: {}, "emoji.json lists no images"),
        (lambda entries: [{"name": "X"}], "emoji.json is not from emoji-datasource-google"),
        (
            lambda entries: [{**entries[0], "image": "../../../etc/passwd.png"}],
            "is not from emoji-datasource-google",
        ),
        (lambda entries: [{**entries[0], "image": "1f999.png"}], "1 of 1 images could not be read"),
    ],
)
def test_other_packages_are_refused(tmp_path, change, message, capsys):
    made = package(tmp_path / "package", change)
    assert main([str(made), "--out", str(tmp_path / "out")]) == 4
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("content", [None, b"no archive", b""])
def test_no_package(tmp_path, content, capsys):
    path = tmp_path / "emoji.tgz"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 4
    assert "emoji-datasource-google" in capsys.readouterr().err


def test_the_recipe_fits_these_images():
    config = load_config("emoji")
    model = config.model
    assert (model.in_channels, model.input_size, model.num_classes) == (3, 64, 9) and config.data.path == "emoji"
    assert not config.data.horizontal_flip, "a mirrored flag or letter is a different one"
