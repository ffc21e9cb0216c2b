"""The work, the memory and the message that hostile images, names and keys cost are bounded."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.config.deepspeed_keys import check_keys
from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.sources import images
from diffmoe_ds.data.sources.images import open_rgb
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.errors import ConfigError, DataError
from tests.helpers.data import PNG, image_file


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_of_pages(count: int) -> bytes:
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    pages = (page + struct.pack("<I", 8 + number * (len(page) + 4)) for number in range(1, count + 1))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages)


def jpeg_of_scans(count: int) -> bytes:
    data = saved(Image.new("L", (8, 8)), "JPEG", progressive=True)
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[scan:end] * count + data[end:]


def bmp_of_runs(count: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, 2 * count, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + 2 * count, 0, 0, 1078) + header + bytes(1024) + b"\1\1" * count


def test_the_work_of_decoding_is_bounded(monkeypatch):
    with pytest.raises(ValueError, match="animated, with several frames"):
        open_rgb(tiff_of_pages(20_000))  # each page takes Pillow 0.1 ms, so they are not counted
    assert open_rgb(jpeg_of_scans(20)).size == (8, 8)
    with pytest.raises(ValueError, match="more than 100 scans"):
        open_rgb(jpeg_of_scans(101))
    for width, height in ((70_000, 1), (1, 70_000)):
        with pytest.raises(ValueError, match=f"{width}x{height} pixels could be a decompression bomb"):
            open_rgb(image_file(np.zeros((height, width), np.uint8)))
    monkeypatch.setattr(images, "MAX_READS", 5000)
    with pytest.raises(ValueError, match="more than 5,000 parts"):
        open_rgb(bmp_of_runs(5000))
    monkeypatch.setattr(images, "MAX_WEBP_PIXELS", 3)
    with pytest.raises(ValueError, match="a WebP of 2x2 pixels"):
        open_rgb(saved(Image.new("RGB", (2, 2)), "WEBP"))


def test_transparency_is_composited_in_strips(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    expected = np.asarray(open_rgb(image_file(pixels)))
    sizes = []
    composite = Image.alpha_composite
    monkeypatch.setattr(Image, "alpha_composite", lambda a, b: sizes.append(b.size) or composite(a, b))
    monkeypatch.setattr(images, "STRIP_PIXELS", 15)
    assert (np.asarray(open_rgb(image_file(pixels))) == expected).all()
    assert sizes == [(7, 2)] * 4 + [(7, 1)]


@pytest.mark.parametrize(
    "command",
    (
        "train --dry-run --config", "train --dry-run --set data.path={}", "checkpoint inspect", "prepare check", "init",
        "prepare images --out out --images", "scripts --out", "report --out out",
    ),
)  # fmt: skip
def test_names_that_are_too_long_are_named(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    name = "a" * 300
    arguments = command.format(name).split()
    assert main(arguments if name in command.format(name) else [*arguments, name]) in (2, 5)
    error = capsys.readouterr().err
    assert error.startswith("diffmoe: error: ") and "aaa" in error and len(error) < 4100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    (
        "train --dry-run --set data.path={}", "train --dry-run --set data.cache_dir={}", "prepare check {}", "init {}",
        "prepare images --out out --images {}", "evaluate --reference a.npz --samples {}",
    ),
)  # fmt: skip
def test_home_directories_of_unknown_users_are_errors(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main(command.format("~nobody-here/images").split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffmoe: error: ~nobody-here/images: this host has no home directory for the user")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ("{0..9999999999}", "{0..999}{0..999}", "{a,b}" * 40, "{1..%s}" % ("9" * 200)))
def test_patterns_of_too_many_shards_are_refused(pattern):
    for prefix in ("", "https://host.example/"):
        with pytest.raises(DataError, match="names more than 262,144 shards or has more than 16 braces"):
            expand(f"{prefix}{pattern}.tar")


def test_a_link_to_itself_is_an_error(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "out").symlink_to("out")
    assert main(["prepare", "images", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 5
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'}" in error and error.count("\n") == 1


def test_long_errors_are_shortened(capsys):
    assert main(["train", "--dry-run", "--set", "x" * 50_000]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffmoe: error: --set") and error.endswith("...\n") and len(error) < 4100


def test_a_long_value_leaves_the_valid_ones_in_the_error(capsys):
    assert main(["train", "--dry-run", "--set", f"model.name={'x' * 50_000}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffmoe: error: --set: model.name: 'xxx") and "valid: " in error and "tiny-E8" in error
    assert len(error) < 1500


def test_hostile_names_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(f"base: {'a' * 5000}")
    with pytest.raises(ConfigError, match=r"base: 'a+\.\.\. is not known; valid: dsmoe-3B-E16, "):
        load_config(str(tmp_path / "r.yaml"))
    for levels in (3000, 50_000):
        with pytest.raises(ConfigError, match="--set must have the form"):
            load_config(None, [f"deepspeed{'.a' * levels}=1"])


def test_not_more_than_50_invalid_keys_are_named():
    with pytest.raises(ConfigError, match="more than 50 keys are invalid") as caught:
        check_keys({f"k{number}": 1 for number in range(5000)}, "x.json")
    assert len(str(caught.value).splitlines()) == 51
