"""Raw images: every kind that cameras and the web produce is read correctly or refused; folders give the labels."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.dataset import check_first_image, open_dataset, open_source
from diffmoe_ds.data.sources import images
from diffmoe_ds.data.sources.folder import ImageFolder
from diffmoe_ds.data.sources.images import centre_crop, decode_pixels, open_rgb
from diffmoe_ds.data.sources.raw import RawImages
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation.held_out import open_held_out
from tests.helpers.data import GREY, PNG, image_file, npy, write_tar

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    pictures = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    return saved(pictures[0], kind, save_all=True, append_images=pictures[1:])


def test_colours_come_out_right():
    picture = Image.fromarray(COLOUR)
    assert (np.asarray(open_rgb(saved(picture, "PNG"))) == COLOUR).all()
    palette = picture.quantize(16)
    assert (np.asarray(open_rgb(saved(palette, "PNG"))) == np.asarray(palette.convert("RGB"))).all()
    assert (np.asarray(open_rgb(saved(palette, "GIF"))) == np.asarray(palette.convert("RGB"))).all()
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    cmyk = np.asarray(open_rgb(saved(flat.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(cmyk - (200, 40, 90)).max() < 12
    assert (np.asarray(open_rgb(image_file(GREY)))[..., 1] == GREY).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert np.asarray(open_rgb(image_file(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]
    rgb = struct.pack(">4H", 0, 0x80FF, 0xFFFF, 0x1234)[2:]  # one row of one pixel, 16 bits a channel
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + rgb))]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (*chunks, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert np.asarray(open_rgb(data))[0, 0].tolist() == [0x80, 0xFF, 0x12]


def test_alpha_is_composited_onto_white():
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = 10, 20, 30, 255
    pixels = np.asarray(open_rgb(image_file(clear)))
    assert pixels[0, 0].tolist() == [10, 20, 30] and (pixels[1] == 255).all()
    palette = Image.fromarray(COLOUR).quantize(4)
    found = np.asarray(open_rgb(saved(palette, "PNG", transparency=0)))
    assert (found[np.asarray(palette) == 0] == 255).all()
    grey = saved(Image.merge("LA", [Image.new("L", (2, 2), 40), Image.fromarray(clear[..., 3])]), "PNG")
    assert decode_pixels(grey, "png").tolist() == [[[40, 255], [255, 255]]]  # grey stays one channel
    for data in (image_file(clear), saved(palette, "PNG", transparency=0), grey):  # shards are decoded alike
        assert (decode_pixels(data, "png") == np.asarray(open_rgb(data)).transpose(2, 0, 1)).all()


def test_only_the_first_view_of_a_camera_is_read():
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    photograph = saved(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert np.asarray(open_rgb(photograph))[0, 0].tolist() == [254, 0, 0]


def test_bytes_around_the_scans_of_a_photograph_are_not_scans():
    """The video that phones append and the metadata contain the bytes of any marker."""
    photograph = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
    metadata = b"\xff\xee\x02\x02" + b"\xff\xda" * 256
    for data in (photograph + b"\xff\xda" * 200, photograph[:2] + metadata + photograph[2:]):
        assert np.asarray(open_rgb(data))[0, 0].tolist() == [254, 0, 0]
        assert decode_pixels(data, "jpg")[:, 0, 0].tolist() == [254, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = Image.fromarray(COLOUR)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    turned = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    for kind, options in (
        ("PNG", {"exif": exif}), ("TIFF", {"exif": exif}), ("WEBP", {"exif": exif, "lossless": True}),
        ("WEBP", {"xmp": xmp, "lossless": True}),
    ):  # fmt: skip
        data = saved(turned, kind, **options)
        assert (np.asarray(open_rgb(data)) == COLOUR).all(), kind
        if kind != "TIFF":
            assert (decode_pixels(data, kind.lower()) == COLOUR.transpose(2, 0, 1)).all(), kind
    grey = saved(turned.convert("L"), "JPEG", exif=exif, quality=95)
    found = decode_pixels(grey, "jpg").astype(int)
    assert found.shape == (1, 6, 9) and np.abs(found[0] - np.asarray(upright.convert("L"))).mean() < 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"no image", "it does not start like an image file"),
        (PNG[:-30], "runcated|broken|IDAT|unrecognized"),
        (frames("GIF"), "it is animated, with several frames"),
        (frames("PNG"), "it is animated, with several frames"),
        (frames("WEBP"), "it is animated, with several frames"),
        (saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "pixel mode F has no known range"),
    ],
    ids=["empty", "text", "truncated", "gif", "apng", "webp", "float"],
)
def test_what_cannot_be_read_is_refused(data, message):
    with pytest.raises(Exception, match=message):
        open_rgb(data)


def test_animated_images_in_shards_are_refused():
    for kind in ("png", "webp"):
        with pytest.raises(ValueError, match="animated"):
            decode_pixels(frames(kind.upper()), kind)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(monkeypatch):
    strip = Image.new("RGB", (4000, 1))  # a hundred bytes as PNG, and gigabytes before it is cropped
    with pytest.raises(ValueError, match="1024000x256 pixels could be a decompression bomb"):
        centre_crop(strip, 256)
    assert centre_crop(strip, 8).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(Exception, match="decompression bomb"):
        open_rgb(PNG)


def reference_crop(picture: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, as in its published code: halve with BOX, resize with BICUBIC, crop the centre."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(64, 64), (31, 90), (200, 77), (16, 16), (5, 9), (33, 32)])
def test_the_crop_matches_adm(shape):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    crop = centre_crop(picture, 16)
    assert crop.shape == (3, 16, 16) and crop.dtype == np.uint8 and crop.flags.c_contiguous
    assert (crop == reference_crop(picture, 16)).all()


def test_a_crop_in_grayscale():
    picture = Image.fromarray(GREY)
    assert (centre_crop(picture, 5) == reference_crop(picture.convert("RGB"), 5)[:1]).all()


# --- folders --------------------------------------------------------------------------------------------------


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_with_the_channels_of_the_model(tmp_path, channels):
    """For training, validation during training and ``evaluate --validation``; also if the files differ."""
    files = {"a.png": image_file(GREY), "b.png": saved(Image.fromarray(COLOUR), "PNG"), "c.png": image_file(GREY)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    options = [
        f"data.path={tmp_path}", f"data.validation_path={tmp_path}", "eval.every_images=64", "model.num_classes=1",
        "model.input_size=4", f"model.in_channels={channels}",
    ]  # fmt: skip
    config = load_config("fashion", options)
    dataset = open_dataset(config)
    check_first_image(config, dataset)
    held_out = open_held_out(config)
    assert held_out is not None
    (batch,) = held_out.batches(3)
    for index, data in enumerate(files.values()):
        expected = centre_crop(open_rgb(data).convert("L" if channels == 1 else "RGB"), 4)
        assert (dataset[index].image == expected).all() and len(expected) == channels
        assert batch.x[index].numpy() == pytest.approx(expected / 127.5 - 1, abs=1e-6)


def test_class_folders_and_flat_folders(tmp_path):
    labelled = ImageFolder(put(tmp_path / "a", "dog/2.png", "cat/x.y.JPG", "dog/1.jpeg", "dog/notes.txt", ".git/i.png"))
    assert labelled.classes == ["cat", "dog"] and labelled.labels.tolist() == [0, 1, 1]
    assert [labelled.key(i) for i in range(3)] == ["cat/x_y", "dog/1", "dog/2"]
    assert labelled.image_bytes(0) == PNG
    flat = ImageFolder(put(tmp_path / "b", "2.png", "1.png", "2.jpg"))
    assert flat.classes is None and flat.labels.tolist() == [-1] * 3
    assert [flat.key(i) for i in range(3)] == ["1", "2_jpg", "2_png"]
    put(tmp_path / "a", "cat/.thumbnails/1.png")
    assert len(ImageFolder(tmp_path / "a")) == 3, "hidden folders are left out"
    put(tmp_path / "c", ".thumbnails/1.png", "x/.thumbnails/y/2.png", "x/.hidden.png")
    deep = ImageFolder(put(tmp_path / "c", "x/y/1.png", "x/2.png", "3.png"), unlabelled=True)
    assert [deep.key(i) for i in range(3)] == ["3", "x/2", "x/y/1"] and set(deep.labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images; expected files named"),
        (["notes.txt"], "holds no image"),
        (["Cat/1.png", "cat/2.png"], "holds two classes whose names differ in case only, 'Cat' and 'cat'"),
        (["caf\u00e9/1.png", "cafe\u0301/2.png"], "holds two classes whose names differ in case only"),
        (["cat/1.png", "2.png"], "holds images, such as 2.png, next to the folders cat"),
        (["train/cat/1.png", "val/cat/2.png"], "holds images in a nested folder, cat"),
        (["cat/1.png", "dog/notes.txt"], "class folder .*dog holds no images; remove it"),
        (["cat/a.b.png", "cat/a_b.png", "cat/a_b_png.png", "cat/a.b_png.jpg"], "would both have the key 'cat/a_b_png'"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, message, capsys):
    (tmp_path / "images").mkdir()
    put(tmp_path / "images", *names)
    with pytest.raises(DataError, match=message):
        ImageFolder(tmp_path / "images")
    out = tmp_path / "out"
    assert main(["prepare", "images", "--images", str(tmp_path / "images"), "--out", str(out)]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error and not out.exists()


def test_odd_files_among_good_ones_are_counted(tmp_path, monkeypatch):
    """One of each kind: stored or listed in the report."""
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1 << 16)
    folder = put(tmp_path / "images", "a/good.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "a" / "turned.jpg").write_bytes(saved(Image.fromarray(COLOUR), "JPEG", exif=exif))
    (folder / "a" / "really-png.jpg").write_bytes(PNG)
    (folder / "a" / "cmyk.jpg").write_bytes(saved(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"))
    (folder / "a" / "zero.png").write_bytes(b"")
    (folder / "a" / "moving.gif").write_bytes(frames("GIF"))
    (folder / "a" / "huge.png").write_bytes(PNG + bytes(1 << 16))
    (folder / "a" / "secret.png").symlink_to("/nowhere")
    os.mkfifo(folder / "a" / "pipe.png")  # opening it would block
    (folder / "a" / "strip.png").write_bytes(saved(Image.new("RGB", (1_500_000, 1)), "PNG"))
    arguments = ["--images", str(folder), "--size", "8", "--out", str(tmp_path / "out"), "--max-unreadable", "0.6"]
    assert main(["prepare", "images", *arguments]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {each["key"]: each["reason"] for each in report["skipped"]}
    assert set(reasons) == {"a/zero", "a/moving", "a/huge", "a/secret", "a/strip", "a/pipe"} and report["stored"] == 4
    assert "not a regular file" in reasons["a/pipe"]
    assert "empty" in reasons["a/zero"] and "animated" in reasons["a/moving"] and "the limit is" in reasons["a/huge"]


@pytest.mark.parametrize("image", ["a/1.png", "1.png", "a/b/1.png"])
def test_a_folder_of_both_shards_and_images_is_refused(tmp_path, image, capsys):
    """Otherwise a stray tar next to class folders would pass for the whole dataset, or be ignored."""
    folder = put(tmp_path / "images", image)
    write_tar(folder / "stray.tar", [("s.png", PNG)])
    message = rf"holds both shards, such as stray.tar, and images, such as {image}; give .*/\*.tar for the shards"
    with pytest.raises(DataError, match=message):
        open_source(folder)
    assert len(open_source(f"{folder}/*.tar")) == 1
    (folder / image).rename(folder / ".1.png")
    assert len(open_source(folder)) == 1


def test_tars_as_users_pack_them(tmp_path):
    """Links are reported, rare kinds are read as in folders, and labels are ignored on request."""
    members = [("x.png", PNG), ("x.cls", b"7"), ("z.gif", image_file(GREY, "GIF")), ("z.cls", b"7")]
    write_tar(tmp_path / "in.tar", members)
    with tarfile.open(tmp_path / "in.tar", "a") as tar:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png"
            tar.addfile(info)
    arguments = ["--images", str(tmp_path / "in.tar"), "--size", "4", "--out", str(tmp_path / "out"), "--unlabelled"]
    assert main(["prepare", "images", *arguments, "--max-unreadable", "0.5"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stored"] == 2 and {each["key"] for each in report["skipped"]} == {"hard", "soft"}
    assert all("has a link or another special member" in each["reason"] for each in report["skipped"])
    dataset = ShardDataset(expand(tmp_path / "out"))
    assert sorted(map(dataset.key, range(2))) == ["x", "z"] and set(dataset.labels.tolist()) == {-1}


@pytest.mark.parametrize("name", ["../../escaped.png", "/tmp/escaped.png", "a/../../escaped.png"])
def test_names_that_lead_out_of_an_archive(tmp_path, name, capsys):
    write_tar(tmp_path / "in.tar", [(name, PNG), (name.replace("png", "cls"), b"0")])
    before = sorted(os.listdir(tmp_path.parent))
    arguments = ["prepare", "images", "--images", str(tmp_path / "in.tar"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 4
    assert "has a name that leads out of the archive" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path.parent)) == before and sorted(os.listdir(tmp_path)) == ["in.tar"]


def test_a_latent_shard_is_not_a_source_of_images(tmp_path, capsys):
    write_tar(tmp_path / "in.tar", [("a.npy", npy(np.zeros((4, 2, 2), np.float32))), ("a.cls", b"0")])
    arguments = ["prepare", "images", "--images", str(tmp_path / "in.tar"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 4
    assert "1 of 1 images could not be read" in capsys.readouterr().err


def test_a_reason_is_part_of_a_sentence(tmp_path, monkeypatch):
    """Pillow's own sentences end with a full stop."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    put(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"could be decompression bomb DOS attack$"):
        RawImages(ImageFolder(tmp_path), 8)[0]
