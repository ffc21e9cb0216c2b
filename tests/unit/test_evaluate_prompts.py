"""``diffmoe evaluate --clip`` and ``--retrieval``: scores of images with prompts, and rejected inputs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.images import png
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.evaluation.evaluate import Team
from diffmoe_ds.evaluation.retrieval import nearest_images
from diffmoe_ds.files import write_tar
from tests.helpers.clip import SIZE, save_clip
from tests.helpers.encoders import tiny_encoder, tokenizer
from tests.helpers.features import assert_same
from tests.helpers.sampling import write_random_model

AVERAGES = "tests.helpers.features:Averages"
PROMPTS = ("red apple", "blue car", "a pear on the house", "small  Green pear")


def pictures(count: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_samples(folder: Path, images: np.ndarray, labels: list[int], prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Write what ``diffmoe sample`` writes: samples.npz, prompts.txt and a grid."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.array(labels))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    Image.fromarray(images[0]).save(folder / "grid.png")
    return folder


def write_dataset(folder: Path, images: np.ndarray, captions: list[str]) -> Path:
    folder.mkdir()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption)
    return folder


@pytest.fixture
def evaluate(capsys):
    def run(samples: object, *options: object, code: int = 0, json_output: bool = True) -> dict[str, object] | str:
        """Return the JSON object, the text, or the error."""
        arguments = ["evaluate", "--samples", str(samples), "--extractor", AVERAGES, *map(str, options)]
        assert main([*arguments, "--json"] if json_output else arguments) == code
        captured = capsys.readouterr()
        if code == 0:
            return json.loads(captured.out) if json_output else captured.out
        (line,) = [line for line in captured.err.splitlines() if line.startswith("diffmoe: error: ")]
        assert not captured.out and "Traceback" not in captured.err
        return line

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


def direct_score(folder: Path, images: np.ndarray, prompts: list[str]) -> float:
    """Compute the score from its definition, without padding, torchmetrics or the package."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    mean, std = (np.array(v, np.float32) for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy((np.asarray(picture, np.float32) / 255 - mean) / std).permute(2, 0, 1)[None]
        ids = [*tokenizer()(prompt)["input_ids"][:-1][:7], 1]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
        scores.append(100 * float((found.text_embeds * found.image_embeds).sum()))
    return float(np.mean(scores))


def test_clip_score_is_the_mean_cosine(evaluate, clip, tmp_path):
    """Images are resized, prompts beyond the model's length keep their last token, and batches change nothing."""
    prompts = (*PROMPTS, "red green blue apple pear car house small large a the on of in")
    labels = [number % 5 for number in range(12)]
    images = pictures(12, 24)
    samples = write_samples(tmp_path / "samples", images, labels, prompts)
    found = evaluate(samples, "--clip", clip)
    expected = direct_score(clip, images, [prompts[label] for label in labels])
    assert expected > 1
    assert found["clip_score"] == pytest.approx(expected, abs=1e-4)
    assert set(found) == {"n", "clip_model", "clip_score"} and found["n"] == 12
    assert found["clip_model"].startswith("tiny-clip:")
    assert evaluate(samples, "--clip", clip, "--batch-size", 7)["clip_score"] == pytest.approx(
        found["clip_score"], 1e-5
    )
    text = evaluate(samples, "--clip", clip, json_output=False)
    assert text.startswith("CLIP score ") and text.count("\n") == 1


def test_prompts_come_from_every_result_of_sampling_and_from_captions(evaluate, clip, tmp_path):
    images, labels = pictures(6), [0, 1, 2, 3, 0, 1]
    samples = write_samples(tmp_path / "samples", images, labels)
    expected = evaluate(samples / "samples.npz", "--clip", clip)
    assert evaluate(samples, "--clip", clip) == expected
    folder = tmp_path / "pngs" / "png"
    folder.mkdir(parents=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "prompt"])
        for number, label in enumerate(labels):
            Image.fromarray(images[number]).save(folder / f"{number:06}.png")
            rows.writerow([f"{number:06}.png", label, PROMPTS[label]])
    captions = [PROMPTS[label] for label in labels]
    write_dataset(tmp_path / "captioned", images, captions)
    members = [
        (f"{number}.{suffix}", data)
        for number, image in enumerate(images)
        for suffix, data in (("png", png(image.transpose(2, 0, 1))), ("txt", captions[number].encode()))
    ]
    write_tar(tmp_path / "s.tar", members)
    for name in ("pngs", "pngs/png", "captioned", "s.tar"):
        assert evaluate(tmp_path / name, "--clip", clip) == expected


def test_retrieval_of_the_dataset_itself_is_perfect(evaluate, tmp_path):
    """Its control is chance level; captions are compared without case and white space; other prompts do not count."""
    names = [f"thing {number}" for number in range(20)]
    images = pictures(40)
    captions = [f"another caption\n THING  {number % 20}" for number in range(40)]
    dataset = write_dataset(tmp_path / "dataset", images, captions)
    prompts = (*names, "unknown thing")
    generated = np.concatenate([images, pictures(3, seed=1)])
    samples = write_samples(tmp_path / "samples", generated, [*range(20), *range(20), 20, 20, 20], prompts)
    found = evaluate(samples, "--retrieval", dataset)
    assert {name: found[name] for name in found if not name.endswith("interval")} == {
        "extractor": AVERAGES, "n": 43, "retrieval_precision": 1, "retrieval_top5": 1, "retrieval_control": 0,
        "retrieval_n": 40, "retrieval_n_reference": 40,
    }  # fmt: skip
    low, high = found["retrieval_precision_interval"]
    assert 0.9 < low < high == 1
    text = evaluate(samples, "--retrieval", dataset, json_output=False)
    assert text.startswith("retrieval ") and "control 0, top 5 1 " in text and "40 of 43 images" in text

    shifted = write_samples(tmp_path / "shifted", images, [(number + 1) % 20 for number in range(40)], prompts)
    wrong = evaluate(shifted, "--retrieval", dataset)
    assert wrong["retrieval_precision"] == 0
    assert 0 < wrong["retrieval_control"] < 0.2, "some derangements give an image its own prompt"


def test_retrieval_with_noise_lies_between_and_is_shown_beside_a_reference(evaluate, clip, tmp_path):
    images = pictures(30, 8)
    dataset = write_dataset(tmp_path / "dataset", images, [f"thing {number}" for number in range(30)])
    other = pictures(30, 8, 1)
    mixed = np.concatenate([images[:15], other[15:]])
    names = tuple(f"thing {number}" for number in range(30))
    samples = write_samples(tmp_path / "samples", mixed, list(range(30)), names)
    found = evaluate(samples, "--retrieval", dataset, "--clip", clip, "--reference", dataset)
    assert 0.5 <= found["retrieval_precision"] < 0.7 <= found["retrieval_top5"] + 0.2
    assert found["retrieval_control"] < 0.1
    assert found["frechet"] > 0 and found["clip_score"] >= 0 and found["n_reference"] == 30
    same = write_samples(tmp_path / "same", mixed, [3] * 30, names)
    assert evaluate(same, "--retrieval", dataset)["retrieval_control"] is None


def test_generated_images_are_scored_as_written_ones(evaluate, clip, tmp_path, capsys):
    text = TextEncoders([str(tiny_encoder("t5"))], torch.device("cpu"), 6).format
    model = write_random_model(tmp_path / "model", text=text)
    dataset = write_dataset(tmp_path / "dataset", pictures(4), [*PROMPTS[:2], "x", "y"])
    options = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--per-prompt", "3", "--steps", "2"]
    assert main(["sample", "--checkpoint", str(model), "--out", str(tmp_path / "out"), *options]) == 0
    metrics = ["--clip", str(clip), "--retrieval", str(dataset), "--extractor", AVERAGES, "--json"]
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(model), *options, *metrics]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("capacity") > 0
    assert found["n"] == found["retrieval_n"] == 6
    assert_same(found, evaluate(tmp_path / "out", *metrics[:-1]))
    classes = write_random_model(tmp_path / "classes", ["cat", "dog"])
    for option in ("--clip", "--retrieval"):
        assert main(["evaluate", "--checkpoint", str(classes), option, str(dataset), "--num-images", "4"]) == 2
        message = f"{option} needs prompts; {classes} generates images from classes"
        assert message in capsys.readouterr().err


def test_nearest_images_match_a_plain_sort(monkeypatch):
    """For any blocks; of equally near images the first ones count."""
    generator = torch.Generator().manual_seed(0)
    samples_NF, dataset_RF = torch.randn(9, 6, generator=generator), torch.randn(23, 6, generator=generator)
    dataset_RF[20] = dataset_RF[4] * 2
    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in (samples_NF, dataset_RF)]
    unit[1][20] = unit[1][4]
    expected = (unit[0] @ unit[1].T).float().sort(dim=1, descending=True, stable=True).indices[:, :5]
    for rows in (4, 7, 2048):
        monkeypatch.setattr("diffmoe_ds.evaluation.retrieval.BLOCK_ROWS", rows)
        monkeypatch.setattr("diffmoe_ds.evaluation.sharded.BLOCK_ROWS", rows)
        assert torch.equal(nearest_images(Team().rows(samples_NF), Team().rows(dataset_RF)), expected)
    assert nearest_images(Team().rows(samples_NF), Team().rows(dataset_RF[:2])).shape == (9, 2)


def test_images_without_prompts_are_refused(evaluate, clip, tmp_path):
    samples = write_samples(tmp_path / "samples", pictures(4), [0, 1, 2, 9])
    file = samples / "samples.npz"
    assert f"an image has prompt 9, but {samples}/prompts.txt has 4 prompts" in evaluate(file, "--clip", clip, code=4)
    (samples / "prompts.txt").unlink()
    assert "prompts.txt cannot be read: No such file" in evaluate(file, "--clip", clip, code=4)
    (samples / "prompts.txt").write_text("x\n")
    np.savez(file, arr_0=pictures(4))
    assert "has no array 'arr_1'" in evaluate(file, "--clip", clip, code=4)
    np.savez(file, arr_0=pictures(4), arr_1=np.zeros(3, np.int64))
    assert "arr_1 is int64 [3]; expected the number of each image's prompt, int64 [4]" in evaluate(
        file, "--clip", clip, code=4
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, image in enumerate(pictures(3)):
        Image.fromarray(image).save(folder / f"{number}.png")
    assert "has no caption; expected" in evaluate(folder, "--clip", clip, code=4)


def test_datasets_that_do_not_fit_are_refused(evaluate, tmp_path):
    samples = write_samples(tmp_path / "samples", pictures(4), [0, 1, 2, 3])
    dataset = write_dataset(tmp_path / "dataset", pictures(3), ["one", "two", "three"])
    message = evaluate(samples, "--retrieval", dataset, code=4)
    assert f"--retrieval {dataset}: its captions include none of the 4 prompts, such as 'red apple'" in message
    (dataset / "001.txt").unlink()
    assert "001.png has no caption; expected" in evaluate(samples, "--retrieval", dataset, code=4)
    npz = evaluate(samples, "--retrieval", samples / "samples.npz", code=4)
    assert "an .npz file has no captions; expected a folder or shards" in npz
    assert "--retrieval /nowhere" in evaluate(samples, "--retrieval", "/nowhere", code=4)


def test_models_that_are_not_clip_are_refused(evaluate, clip, tmp_path):
    samples = write_samples(tmp_path / "samples", pictures(4), [0, 1, 2, 3])
    assert "--clip /nowhere is neither a folder" in evaluate(samples, "--clip", "/nowhere", code=2)
    other = shutil.copytree(clip, tmp_path / "other")
    for name, data, message in (
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
        ("model.safetensors", b"{}", "cannot be loaded"),
        ("config.json", b'{"model_type": "bert"}', "model_type in config.json must be clip, got bert"),
    ):
        (other / name).unlink()
        if data is not None:
            (other / name).write_bytes(data)
        assert message in evaluate(samples, "--clip", other, code=4)
    (other / "config.json").write_bytes((clip / "config.json").read_bytes())
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    assert "cannot be loaded" in evaluate(samples, "--clip", other, code=4), "nothing is unpickled"


def test_nan_and_the_hub(evaluate, clip, tmp_path, monkeypatch):
    samples = write_samples(tmp_path / "samples", pictures(4), [0, 1, 2, 3])
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(clip)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert evaluate(samples, "--clip", "someone/tiny")["clip_model"].startswith("tiny:")
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} < set(asked["someone/tiny"])
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["someone/tiny"])
    model = transformers.CLIPModel.from_pretrained(clip)
    model.visual_projection.weight.data[0, 0] = float("nan")
    broken = shutil.copytree(clip, tmp_path / "broken")
    model.save_pretrained(broken)
    assert "the embedding of an image or a prompt contains NaN or Inf" in evaluate(samples, "--clip", broken, code=3)


def test_a_metric_is_required(evaluate, tmp_path):
    samples = write_samples(tmp_path / "samples", pictures(4), [0, 1, 2, 3])
    missing = "--reference is missing; it is optional with --clip, --retrieval or --validation"
    assert missing in evaluate(samples, code=2)
    assert "needs --reference" in evaluate(samples, "--clip", "x", "--save-reference", "r.npz", code=2)
