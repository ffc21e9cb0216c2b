"""``diffmoe sample`` and the Python interface with a text model: prompts, encoders, results and errors."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import diffmoe_ds
from diffmoe_ds.cli import main, sample_set
from diffmoe_ds.cli.sample_prompts import read_prompts
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling import output
from diffmoe_ds.sampling.output import is_geneval_folder, write_geneval
from tests.helpers.encoders import tiny_encoder
from tests.helpers.sampling import write_random_model

APPLE, CAR = ("--prompt", "a red apple"), ("--prompt", "the blue car")
LONG = "a small red apple on the large house"
ENCODER = str(tiny_encoder("bert"))


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def run(checkpoint: Path, out: Path, *options: str) -> int:
    return main(["sample", "--checkpoint", str(checkpoint), "--steps", "2", "--out", str(out), *options])


def samples_in(out: Path) -> tuple[np.ndarray, list[int]]:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"].tolist()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    text = TextEncoders([ENCODER], torch.device("cpu"), 6).format
    return write_random_model(tmp_path_factory.mktemp("model"), text=text)


@pytest.fixture(scope="module")
def class_model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), ["cat", "dog"])


def geneval_file(tmp_path: Path) -> Path:
    """Two prompts in the form of GenEval, which has further keys."""
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"tag": "colors", "include": [{"class": "apple"}], "prompt": "a red apple"}\n{"prompt": "car"}\n')
    return path


def test_the_results_of_prompts(model, tmp_path):
    """One image per prompt by default, prompts beneath the grid, and the same images alone and from a file."""
    out = tmp_path / "out"
    assert run(model, out, *APPLE, *CAR, "--prompt", "") == 0
    images, labels = samples_in(out)
    assert labels == [0, 1, 2] and not np.array_equal(images[0], images[1])
    assert (out / "prompts.txt").read_text() == "a red apple\nthe blue car\n\n"
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png", "prompts.txt"}
    (tmp_path / "p.txt").write_text("\ufeffthe blue car\r\n\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red apple"}\n{"prompt": "the blue\\ncar", "seed": 1}\n')
    assert run(model, out, "--prompts", str(tmp_path / "p.txt"), "--seed", "1") == 0
    assert np.abs(samples_in(out)[0][0].astype(int) - images[1]).max() <= 1
    options = ("--prompts", str(tmp_path / "p.jsonl"), "--per-prompt", "2", "--format", "both", "--cfg-scale", "2")
    assert run(model, out, *options, "--negative-prompt", "car") == 0
    assert samples_in(out)[1] == [0, 1, 0, 1] and (out / "prompts.txt").read_text() == "a red apple\nthe blue car\n"
    with open(out / "png" / "labels.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[2] == ["000001.png", "1", "the blue\ncar"]
    assert run(model, out, *APPLE) == 0, "replaces the folder"
    assert not (out / "png").exists()


def test_a_class_model_removes_the_prompts_of_earlier_images_but_no_other_file(model, class_model, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    assert run(model, out, *APPLE) == 0
    other.mkdir()
    (other / "prompts.txt").write_text("my own")
    for folder in (out, other):
        assert run(class_model, folder, "--num-images", "2") == 0
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png"}
    assert (other / "prompts.txt").read_text() == "my own"


def test_geneval_reads_the_folder(model, tmp_path):
    """As its evaluator does: digits as folders, an object in metadata.jsonl, and samples with digits as names."""
    out, metadata = tmp_path / "out", geneval_file(tmp_path)
    assert run(model, out, "--geneval", str(metadata), "--batch-size", "3") == 0
    assert {path.name for path in out.iterdir()} == {"geneval", "grid.png", "prompts.txt"}
    names = [f"samples/{number:04d}.png" for number in range(4)]
    expected = {f"{folder}/{name}" for folder in ("00000", "00001") for name in [*names, "metadata.jsonl"]}
    files = files_in(out / "geneval")
    assert set(files) == expected and is_geneval_folder(out / "geneval")
    assert json.loads(files["00000/metadata.jsonl"])["include"] == [{"class": "apple"}]
    assert run(model, tmp_path / "plain", *APPLE, "--prompt", "car", "--per-prompt", "4", "--batch-size", "3") == 0
    with Image.open(BytesIO(files["00001/samples/0002.png"])) as picture:
        assert np.array_equal(np.asarray(picture), samples_in(tmp_path / "plain")[0][5, :, :, 0])
    assert run(model, out, "--geneval", str(metadata), "--per-prompt", "1") == 0
    assert len(files_in(out / "geneval")) == 4
    (out / "geneval" / "00000" / "mine.txt").touch()
    assert run(model, out, "--geneval", str(metadata)) == 2
    assert run(model, out, *APPLE) == 0 and (out / "geneval" / "00000" / "mine.txt").exists()


def test_a_killed_run_continues(capsys, monkeypatch, model, tmp_path):
    options = ("--geneval", str(geneval_file(tmp_path)), "--batch-size", "3")

    def die(folder: Path, images: range, pixels: np.ndarray, prompts: int) -> None:
        write_geneval(folder, images, pixels, prompts)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sample_set, "write_geneval", die)
        with pytest.raises(Killed):
            run(model, tmp_path / "killed", *options)
    for other in ((*APPLE, "--num-images", "8"), (*options, "--cfg-scale", "2", "--negative-prompt", "pear")):
        assert run(model, tmp_path / "killed", *other, "--batch-size", "3") == 2
    errors = capsys.readouterr().err
    assert "was started with --prompt 'a red apple' and 1 more (SHA-256 " in errors and "--cfg-scale 1.0" in errors
    assert run(model, tmp_path / "killed", *options) == 0
    assert "resuming  3 of 3 shards" in capsys.readouterr().out
    assert run(model, tmp_path / "whole", *options) == 0
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


def test_capacity_and_warnings(capsys, model, tmp_path):
    """Thresholds are calibrated on the prompts, and saved for these alone."""
    options = ("--prompt", LONG, "--prompt", LONG + " the", "--capacity", "2", "--steps", "1")
    assert run(model, tmp_path / "out", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.strip().startswith("warning"))
    assert "has 9 tokens" in warning and "reads 6" in warning and warning.endswith("(and 1 other prompt)")
    assert any("thresholds saved" in line for line in lines)
    for more, is_known in (((), True), (("--prompt", "car"), False)):
        assert run(model, tmp_path / "out", *options, *more) == 0
        assert ("thresholds for 2 from" in capsys.readouterr().out) == is_known


def test_guides_need_the_same_encoders(capsys, model, tmp_path):
    text = TextEncoders([ENCODER], torch.device("cpu"), 6).format
    assert run(model, tmp_path / "out", *APPLE, "--cfg-scale", "2", "--autoguidance", str(model)) == 0
    assert "hardly changes" not in capsys.readouterr().out
    other = replace(text, encoders=(replace(text.encoders[0], sha256="0" * 64),))
    guide = write_random_model(tmp_path / "guide", text=other)
    assert run(model, tmp_path / "out", *APPLE, "--cfg-scale", "2", "--autoguidance", str(guide)) == 2
    assert "was trained with text encoders other than those of" in capsys.readouterr().err


def test_mistakes_with_prompts(capsys, model, class_model, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "cat"}\n\n{"text": "dog"}\n')
    (tmp_path / "worse.jsonl").write_text("{cat}\n")
    both, clip, t5 = str(geneval_file(tmp_path)), str(tiny_encoder("clip")), str(tiny_encoder("t5"))
    capsys.readouterr()  # progress bars of transformers
    for checkpoint, options, message in (
        (model, [], "generates images from prompts; pass --prompt TEXT or --prompts FILE."),
        (model, ["--classes", "1"], "--classes 1: "),
        (class_model, APPLE, "--prompt: "),
        (class_model, ["--geneval", both], "generates images from classes, not prompts; use --classes."),
        (model, [*APPLE, "--prompts", "p.txt"], "--prompt and --prompts contradict each other; omit one."),
        (model, ["--prompts", str(tmp_path / "none.txt")], "none.txt: cannot be read: No such file"),
        (model, ["--prompts", str(tmp_path / "empty.txt")], "empty.txt: has no prompts; expected one on each line."),
        (model, ["--prompts", str(tmp_path / "latin.txt")], "latin.txt: must be UTF-8."),
        (model, ["--prompts", str(tmp_path / "bad.jsonl")], 'line 3 must be like {"prompt": "a red apple"}, got'),
        (model, ["--geneval", str(tmp_path / "worse.jsonl")], "worse.jsonl: line 1 is not valid JSON: "),
        (model, ["--geneval", both, "--format", "png"], "--geneval and --format png contradict each other"),
        (model, ["--geneval", both, "--num-images", "2"], "--geneval and --num-images 2 contradict each other"),
        (model, ["--geneval", both, "--labels", "random"], "--geneval and --labels random contradict each other"),
        (model, [*APPLE, "--per-prompt", "2", "--num-images", "2"], "--per-prompt 2 and --num-images 2 contradict"),
        (model, [*APPLE, "--negative-prompt", "car"], "--negative-prompt needs guidance; set --cfg-scale to"),
        (model, ["--prompt", "\udcff"], "--prompt: '\\udcff' is not valid Unicode."),
        (model, ["--prompt", "x" * 70_000], "--prompt: a prompt has 70,000 bytes; the limit is 65,536."),
        (model, [*APPLE, "--text-encoder", "/none"], "/none"),
        (model, [*APPLE, *["--text-encoder", ENCODER] * 2], "--text-encoder must be given 1 time, for "),
        (model, [*APPLE, "--text-encoder", clip], "clip) has pooled width 12 instead of 16 ("),
        (model, [*APPLE, "--text-encoder", t5], "t5) has the sha256 "),
    ):
        assert run(checkpoint, tmp_path / "out", *options) == 2, options
        *bars, error = capsys.readouterr().err.splitlines()
        assert message in error and all("Loading weights" in bar or not bar for bar in bars), (message, bars, error)
    assert not (tmp_path / "out").exists()


@given(data=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_file_of_prompts_is_read_or_refused_in_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("prompts.txt", "prompts.jsonl"):
        path = folder / name
        path.write_bytes(data)
        try:
            prompts = read_prompts(path)
        except ConfigError as error:
            assert str(error).startswith(f"--prompts {path}: ") and "\n" not in str(error)
        else:
            lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
            assert name.endswith(".jsonl") or prompts == [line for line in lines if line]


@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=4))
def test_jsonl_files_hold_any_prompt(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n", encoding="utf-8")
    assert read_prompts(path) == prompts


def test_encoders_move_with_their_folder(capsys, tmp_path):
    """The checkpoint says where the encoder was, and by its SHA-256 which one it was."""
    folder = Path(shutil.copytree(ENCODER, tmp_path / "encoder"))
    text = TextEncoders([str(folder)], torch.device("cpu"), 6).format
    model = write_random_model(tmp_path / "model", text=text)
    folder.rename(tmp_path / "moved")
    assert run(model, tmp_path / "out", *APPLE) == 2
    assert "; pass its folder with --text-encoder." in capsys.readouterr().err
    assert run(model, tmp_path / "out", *APPLE, "--text-encoder", str(tmp_path / "moved")) == 0
    other = write_random_model(tmp_path / "other", text=TextEncoders([ENCODER], torch.device("cpu"), 6).format)
    (tmp_path / "moved" / "vocab.txt").write_text("changed")
    assert run(model, tmp_path / "out", *APPLE, "--text-encoder", str(tmp_path / "moved")) == 2
    assert "has the sha256" in capsys.readouterr().err and other.exists()


def test_the_python_interface_generates_the_same_images(capsys, model, class_model, tmp_path):
    loaded = diffmoe_ds.load(model, text_encoder=ENCODER)
    assert repr(loaded) == "Model(nano-E4, 32x32x1, text to image, trained on 16 images)"
    samples = loaded.sample(prompts=["a red apple", LONG], negative_prompt="car", steps=2, cfg_scale=2.0)
    assert samples.prompts == ("a red apple", LONG) and samples.labels.tolist() == [0, 1]
    assert "warning: the prompt" in "".join(capsys.readouterr())
    options = (*APPLE, "--prompt", LONG, "--negative-prompt", "car", "--cfg-scale", "2")
    assert run(model, tmp_path / "out", *options) == 0
    assert np.array_equal(samples_in(tmp_path / "out")[0], samples.images)
    with Image.open(BytesIO(samples._repr_png_())) as shown, Image.open(tmp_path / "out" / "grid.png") as grid:
        assert np.array_equal(np.asarray(shown), np.asarray(grid))
    assert loaded.sample(prompts=("car",), seeds=range(3), steps=1, capacity=2.0).labels.tolist() == [0, 0, 0]


def test_mistakes_in_the_python_interface(model, class_model):
    loaded, other = diffmoe_ds.load(model), diffmoe_ds.load(class_model)
    for source, arguments, message in (
        (loaded, {}, "the model generates images from prompts; pass prompts, such as"),
        (loaded, {"classes": [1]}, "classes [1]: the model generates images from prompts; use prompts."),
        (loaded, {"prompts": "cat"}, "prompts must be a list of one or more texts, got 'cat'."),
        (loaded, {"prompts": []}, "prompts must be a list"),
        (loaded, {"prompts": [1]}, "prompts must be a list"),
        (loaded, {"prompts": ["\ud800"]}, "prompts: '\\ud800' is not valid Unicode."),
        (loaded, {"prompts": ["cat"], "negative_prompt": "dog"}, "negative_prompt needs guidance; set cfg_scale"),
        (loaded, {"prompts": ["cat"], "negative_prompt": 1}, "negative_prompt must be a text, got 1."),
        (other, {"prompts": ["cat"]}, "prompts: the model generates images from classes, not prompts; use classes."),
        (other, {"negative_prompt": "cat"}, "negative_prompt: the model generates images from classes"),
    ):
        with pytest.raises(ConfigError) as caught:
            source.sample(**arguments)
        assert message in str(caught.value), arguments
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        loaded.sample(prompts=["cat"], step=1)
    for path, arguments, message in (
        (class_model, {"text_encoder": "x"}, "text_encoder 'x': the model generates images from classes; omit it."),
        (model, {"text_encoder": []}, "text_encoder must be a path or a list of paths, got []."),
    ):
        with pytest.raises(ConfigError) as caught:
            diffmoe_ds.load(path, **arguments)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"^text_encoder must be the one used in training: .* has pooled width 12"):
        diffmoe_ds.load(model, text_encoder=tiny_encoder("clip")).sample(prompts=["cat"])


def test_only_complete_geneval_folders_are_replaced(tmp_path):
    assert not is_geneval_folder(tmp_path) and not is_geneval_folder(tmp_path / "none")
    write_geneval(tmp_path, range(3), np.zeros((3, 2, 2, 3), np.uint8), 2)
    assert not is_geneval_folder(tmp_path), "without metadata"
    output.write_metadata(tmp_path, ["{}", "{}"])
    assert is_geneval_folder(tmp_path) and (tmp_path / "00000" / "samples" / "0001.png").is_file()
    (tmp_path / "00001" / "samples" / "cat.png").touch()
    assert not is_geneval_folder(tmp_path)
