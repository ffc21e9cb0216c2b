"""``diffmoe evaluate``: references of every kind, saved statistics, and rejected inputs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.images import png
from diffmoe_ds.files import write_tar
from tests.helpers.features import assert_same

AVERAGES = "tests.helpers.features:Averages"


def pictures(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture
def samples(tmp_path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=pictures(20), arr_1=np.zeros(20, np.int64))
    return path


@pytest.fixture
def evaluate(capsys):
    def run(samples: object, reference: object, *options: str, code: int = 0) -> dict[str, object] | str:
        """Return the JSON object, or the error."""
        arguments = ["--samples", str(samples), "--reference", str(reference), "--extractor", AVERAGES, "--json"]
        assert main(["evaluate", *arguments, *options]) == code
        captured = capsys.readouterr()
        if code == 0:
            found = json.loads(captured.out)
            assert found["extractor"] in arguments + list(options)
            return found
        (line,) = [line for line in captured.err.splitlines() if line.startswith("diffmoe: error: ")]
        assert not captured.out and "Traceback" not in captured.err
        return line

    return run


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


def test_every_kind_of_reference_gives_the_same_numbers(samples, tmp_path, evaluate):
    reference = pictures(30, seed=1)
    np.savez_compressed(tmp_path / "r.npz", arr_0=reference)
    found = evaluate(samples, tmp_path / "r.npz", "--save-reference", str(tmp_path / "saved.npz"))
    assert set(found) == {
        "extractor", "n", "n_reference", "frechet", "frechet_interval", "kid", "kid_std", "inception_score",
        "inception_score_interval", "precision", "precision_interval", "recall", "recall_interval",
    }  # fmt: skip
    assert (found["n"], found["n_reference"]) == (20, 30)
    assert found["frechet_interval"][0] < found["frechet"] < found["frechet_interval"][1]
    assert found["inception_score"] is None, "this extractor has no logits"
    write_folder(tmp_path / "folder", reference)
    write_tar(tmp_path / "s.tar", [(f"{k:03}.png", png(image.transpose(2, 0, 1))) for k, image in enumerate(reference)])
    for other in ("folder", "s.tar", "saved.npz"):
        assert_same(evaluate(samples, tmp_path / other), found)
    assert_same(evaluate(samples, tmp_path / "r.npz", "--batch-size", "7"), found)
    samples_folder = write_folder(tmp_path / "generated", pictures(20))
    assert_same(evaluate(samples_folder, tmp_path / "r.npz"), found)

    with np.load(tmp_path / "saved.npz") as file:
        np.savez(tmp_path / "statistics.npz", mu=file["mu"], sigma=file["sigma"], extractor=file["extractor"])
    alone = evaluate(samples, tmp_path / "statistics.npz")
    assert alone["frechet"] == pytest.approx(found["frechet"], rel=1e-9)
    assert (alone["kid"], alone["precision"], alone["n_reference"]) == (None, None, None)


def test_a_saved_reference_overwrites_no_input(samples, tmp_path, evaluate):
    """Also if it is spelled differently, a link to an input, or the same as the other input."""
    np.savez(tmp_path / "r.npz", arr_0=pictures(9, seed=1))
    write_folder(tmp_path / "folder", pictures(3))
    for link, target in (("link.npz", "r.npz"), ("folder.npz", "folder")):
        (tmp_path / link).symlink_to(target)
    before = {path: path.read_bytes() for path in (samples, tmp_path / "r.npz")}
    for reference, out, option in (
        ("r.npz", "r.npz", "reference"), ("r.npz", "folder/../r.npz", "reference"), ("r.npz", "link.npz", "reference"),
        ("link.npz", "r.npz", "reference"), ("folder", "folder.npz", "reference"), ("r.npz", "samples.npz", "samples"),
    ):  # fmt: skip
        message = evaluate(samples, tmp_path / reference, "--save-reference", str(tmp_path / out), code=2)
        assert f"{out}: would overwrite --{option} " in message
    assert before == {path: path.read_bytes() for path in before} and (tmp_path / "link.npz").is_symlink()


def test_a_set_against_itself(samples, evaluate):
    found = evaluate(samples, samples)
    assert found["frechet"] == pytest.approx(0, abs=1e-12) and (found["precision"], found["recall"]) == (1, 1)
    assert found["frechet_interval"][0] == 0


def test_precision_of_three_reference_images_is_null(samples, tmp_path, evaluate, capsys):
    np.savez(tmp_path / "r.npz", arr_0=pictures(3, seed=1))
    found = evaluate(samples, tmp_path / "r.npz")
    assert (found["precision"], found["precision_interval"]) == (None, None) and found["recall"] is not None
    assert main(["evaluate", "--samples", str(samples), "--reference", str(tmp_path / "r.npz")]) == 0
    assert "precision         nan        " in capsys.readouterr().out


def test_reference_images_are_brought_to_the_size_of_the_samples_as_in_training(samples, tmp_path, evaluate):
    """A folder is resized and cropped, smaller images of shards are padded with zeros."""
    folder = write_folder(tmp_path / "large", pictures(3, 24, 1))
    Image.fromarray(pictures(1, 30, 2)[0, :25]).save(folder / "wide.png")
    halves = pictures(3, 24, 1).reshape(3, 12, 2, 12, 2, 3).mean((2, 4)).round().astype(np.uint8)
    found = evaluate(samples, folder)
    Image.fromarray(halves[0]).save(folder / "000.png")
    assert_same(evaluate(samples, folder), found, rel=1e-2)

    small = pictures(4, 8, 3)
    write_tar(tmp_path / "s.tar", [(f"{k}.png", png(image.transpose(2, 0, 1))) for k, image in enumerate(small)])
    np.savez(tmp_path / "padded.npz", arr_0=np.pad(small, ((0, 0), (2, 2), (2, 2), (0, 0))))
    found = evaluate(samples, tmp_path / "s.tar")
    assert_same(found, evaluate(samples, tmp_path / "padded.npz"))


def test_gray_images_are_repeated(tmp_path, evaluate):
    gray = pictures(20)[..., :1]
    np.savez(tmp_path / "gray.npz", arr_0=gray)
    np.savez(tmp_path / "color.npz", arr_0=gray.repeat(3, axis=3))
    np.savez(tmp_path / "r.npz", arr_0=pictures(9, seed=1))
    gray_found, color_found = (evaluate(tmp_path / f"{name}.npz", tmp_path / "r.npz") for name in ("gray", "color"))
    assert_same(gray_found, color_found)


def test_text_names_extractor_number_and_interval(samples, capsys):
    assert main(["evaluate", "--samples", str(samples), "--reference", str(samples), "--extractor", AVERAGES]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["Frechet distance", "KID", "precision", "recall"]
    for line in lines:
        assert f"{AVERAGES}, 20 images against 20 images" in line and "FID" not in line
    assert "95% interval" in lines[0]


def test_extractors_of_users(samples, evaluate):
    for name in ("Resized", "Rectangle"):
        assert evaluate(samples, samples, "--extractor", f"tests.helpers.features:{name}")["n"] == 20
    real = "expected a tensor of real numbers"
    size = "input_img_size must be a positive integer or (channels, height, width), got"
    for name, message in (
        ("tests.helpers.features:WrongShape", f"returned float32 [2, 3, 12, 12], {real} [2, F], F at least 1."),
        ("tests.helpers.features:Empty", f"returned uint8 [2, 0], {real} [2, F], F at least 1."),
        ("tests.helpers.features:Complex", f"returned complex64 [2, 5], {real} [2, F], F at least 1."),
        ("tests.helpers.features:Varying", f"returned float32 [20, 20], {real} [20, 2]."),
        ("tests.helpers.features:NamedSize", f"{size} big."),
        ("tests.helpers.features:NoSize", f"{size} (3, 0, 8)."),
        ("tests.helpers.features:BoolSize", f"{size} True."),
        ("tests.helpers.features:NamedWidth", "num_features must be a positive integer, got '3'."),
        ("tests.helpers.features:Exits", "cannot be instantiated: SystemExit(0)."),
        ("tests.helpers.features:Missing", "cannot be instantiated: module 'tests.helpers.features' has no attribute"),
        ("no_such_module:Class", "cannot be instantiated: No module named 'no_such_module'"),
        ("resnet", "unknown; expected efficientnet-lite0, inception:WEIGHTS_FILE, dinov2:FOLDER or module:Class"),
    ):
        assert message in evaluate(samples, samples, "--extractor", name, code=2)
    assert "contain NaN or Inf" in evaluate(samples, samples, "--extractor", "tests.helpers.features:NotFinite", code=3)
    assert "not a folder with config.json" in evaluate(samples, samples, "--extractor", "dinov2:/nowhere", code=4)


def test_metrics_that_overflow_are_null(samples, tmp_path, evaluate, capsys):
    np.savez(tmp_path / "r.npz", arr_0=pictures(1100, seed=1))
    name = "tests.helpers.features:Huge"
    found = evaluate(samples, tmp_path / "r.npz", "--extractor", name)
    assert found["kid_std"] is None and found["frechet"] > 0 and found["precision"] is not None
    arguments = ["--samples", str(samples), "--reference", str(tmp_path / "r.npz"), "--extractor", name]
    assert main(["evaluate", *arguments]) == 0
    assert "standard deviation of subsets inf" in capsys.readouterr().out


def test_options_of_generation_need_a_checkpoint(samples, evaluate):
    assert "--validation needs --checkpoint" in evaluate(samples, samples, "--validation", "x", code=2)
    assert "--steps needs --checkpoint" in evaluate(samples, samples, "--steps", "7", code=2)
    missing = str(samples.parent / "missing" / "r.npz")
    assert "the directory does not exist" in evaluate(samples, samples, "--save-reference", missing, code=5)
    assert "--save-reference must end in .npz" in evaluate(samples, samples, "--save-reference", "x", code=2)


def bomb(path: Path, claimed: int) -> None:
    """Write an .npz whose only array claims many images, compressed from zeros."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({claimed}, 64, 64, 3), }}".ljust(117) + "\n"
    data = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        file.write(data)
        for _ in range(80):
            file.write(bytes(1 << 20))


HEADERS = [
    *(b"{'descr': (", b"{[]: 1}", b"{1: 2, 'a': 3}", b"{'descr': (), 'fortran_order': False, 'shape': (2,)}"),
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4, 3)}" + b" " * 20_000,
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4, True)}",
]
"""Invalid ones, for which numpy raises errors of many types or allocates what they claim."""


def damaged_files(folder: Path) -> dict[str, str]:
    """Write invalid files; return what the message about each says."""
    np.savez(folder / "text.npz", arr_0=np.array(["a", "b"]))
    np.savez(folder / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(folder / "flat.npz", arr_0=np.zeros((4, 192), np.uint8))
    np.savez(folder / "rgba.npz", arr_0=np.zeros((4, 8, 8, 4), np.uint8))
    np.savez(folder / "thin.npz", arr_0=np.zeros((4, 32, 0, 3), np.uint8))
    np.savez(folder / "one.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(folder / "columns.npz", arr_0=np.asfortranarray(pictures(4)))
    np.savez(folder / "other.npz", images=pictures(4))
    np.savez(folder / "pickled.npz", arr_0=np.array([{}, {}], dtype=object))
    np.savez(folder / "whole.npz", arr_0=pictures(40))
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-700])
    (folder / "flipped.npz").write_bytes(whole.replace(b"(40, 12, 12, 3)", b"(90, 12, 12, 3)"))
    (folder / "text-file.npz").write_text("no archive")
    for number, header in enumerate(HEADERS):
        with zipfile.ZipFile(folder / f"header-{number}.npz", "w") as archive:
            data = np.lib.format.magic(2, 0) + len(header).to_bytes(4, "little") + header
            archive.writestr("arr_0.npy", data + bytes(64))
    with zipfile.ZipFile(folder / "bz2.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("arr_0.npy", whole)
    bomb(folder / "bomb.npz", 6826)
    bomb(folder / "claim.npz", 10**9)
    return {
        "text": "expected images, uint8 [N, height, width, 1 or 3]",
        "float": "arr_0 is float64 [4, 8, 8, 3]; expected images",
        "flat": "arr_0 is uint8 [4, 192]",
        "rgba": "arr_0 is uint8 [4, 8, 8, 4]",
        "thin": "images of 32x0 pixels; height and width must be from 1 to 4096",
        "one": "1 image; metrics need at least 2",
        "columns": "is in Fortran order",
        "other": "has no array 'arr_0'; it holds images",
        "pickled": "holds pickled objects, which are never loaded",
        "cut": "is not a complete .npz file",
        "flipped": "claims uint8 [90, 12, 12, 3], 38880 bytes, but holds 17280",
        "text-file": "is not a complete .npz file",
        **{f"header-{number}": "has an invalid header" for number in range(len(HEADERS) - 1)},
        f"header-{len(HEADERS) - 1}": "has the shape (2, 4, 4, True)",
        "bz2": "is not compressed as numpy.savez_compressed does",
        "bomb": "refused as a decompression bomb",
        "claim": "refused as a decompression bomb",
        "missing": "does not exist",
    }


def test_invalid_samples_are_refused_in_one_sentence(samples, tmp_path, evaluate):
    for name, message in damaged_files(tmp_path).items():
        for pair in ((tmp_path / f"{name}.npz", samples), (samples, tmp_path / f"{name}.npz")):
            assert message in evaluate(*pair, code=4), name


def test_paths_that_name_no_images_are_refused(samples, tmp_path, evaluate):
    np.save(tmp_path / "array.npy", pictures(4))
    expected = "; expected an .npz file, a folder of images or shards (*.tar or *.tar.gz)."
    for path, problem in ((tmp_path / "array.npy", "is not a tar file"), (tmp_path / "none", "does not exist")):
        assert f"--samples {path} {problem}{expected}" in evaluate(path, samples, code=4)
        assert f"--reference {path} {problem}{expected}" in evaluate(samples, path, code=4)


def test_invalid_folders_are_refused(samples, tmp_path, evaluate):
    folder = write_folder(tmp_path / "mixed", pictures(3))
    Image.fromarray(pictures(1, 20)[0]).save(folder / "large.png")
    message = evaluate(folder, samples, code=4)
    assert "large.png has 20x20 pixels, but the first image has 12x12" in message
    (folder / "large.png").write_bytes(b"no image")
    assert "cannot be decoded" in evaluate(folder, samples, code=4)
    assert "cannot be decoded" in evaluate(samples, folder, code=4)
    np.savez(tmp_path / "large.npz", arr_0=pictures(4, 16))
    assert "have 16x16 pixels, but the evaluated ones 12x12" in evaluate(samples, tmp_path / "large.npz", code=4)
    (tmp_path / "empty").mkdir()
    assert "no" in evaluate(tmp_path / "empty", samples, code=4)


def test_invalid_statistics_are_refused(samples, tmp_path, evaluate):
    valid = {"mu": np.zeros(48), "sigma": np.eye(48), "extractor": np.array(AVERAGES)}
    indefinite = np.eye(48)
    indefinite[0, 1] = indefinite[1, 0] = 3
    for changed, message in (
        ({"sigma": np.eye(47)}, "expected floats [F] and [F, F]"),
        ({"mu": np.zeros((48, 1))}, "expected floats [F] and [F, F]"),
        ({"mu": np.zeros(48, np.int64)}, "expected floats [F] and [F, F]"),
        ({"mu": np.full(48, np.nan)}, "contains NaN or Inf"),
        ({"sigma": np.full((48, 48), np.inf)}, "contains NaN or Inf"),
        ({"sigma": -np.eye(48)}, "is not a covariance"),
        ({"sigma": indefinite}, "is not a covariance"),
        ({"sigma": np.triu(np.ones((48, 48)))}, "is not a covariance"),
        ({"extractor": np.array("efficientnet-lite0")}, "statistics are from efficientnet-lite0, but --extractor is"),
        ({"n": np.array([1])}, "1 image; metrics need at least 2"),
        ({"n": np.array([9]), "features": np.zeros((8, 48), np.float32)}, "expected float32 [9, 48]"),
        ({"n": np.array([2**62])}, "n must be at most 1,000,000,000,000, got 4611686018427387904"),
        ({"n": np.array([8]), "features": np.full((8, 48), np.nan, np.float32)}, "features contains NaN or Inf"),
        ({"extractor": np.array("a\n\x1b[31m")}, "statistics are from unknown, but --extractor is"),
        ({"extractor": np.frombuffer(b"\xff" * 4, "<U1").reshape(())}, "statistics are from unknown"),
        ({"image_size": np.array([64, 64])}, "the images have 64x64 pixels, but the evaluated ones 12x12"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 features, but"),
    ):
        np.savez(tmp_path / "r.npz", **{**valid, **changed})
        assert message in evaluate(samples, tmp_path / "r.npz", code=4), message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffmoe_ds.evaluation.reference.factor", None)  # takes minutes for 16,384 features
        np.savez(tmp_path / "wide.npz", **{**valid, "mu": np.zeros(900), "sigma": np.eye(900)})
        assert "statistics of 900 features, but" in evaluate(samples, tmp_path / "wide.npz", code=4)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(48), sigma=np.eye(48))
    assert "name no extractor, so they are Inception's" in evaluate(samples, tmp_path / "adm.npz", code=4)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=pictures(5))
    assert evaluate(samples, tmp_path / "adm.npz")["n_reference"] == 5, "its images serve any extractor"
