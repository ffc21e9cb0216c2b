"""From the bytes of an image file to pixels: what is accepted, what is refused, and the crop that training takes.

Training reads shards strictly (`decode_pixels`): the file is what its suffix says, with 8 bits a channel.  Preparation
and raw folders take what cameras and the web produce (`open_rgb`), and count what cannot be read.  Both turn pictures
upright and lay transparency on white.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_BYTES = 64 << 20
PIL_FORMATS = {
    "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP",
    "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
}  # fmt: skip
RAW_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""By content and not by suffix: ImageNet has a PNG that is called .JPEG."""
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Where Pillow keeps what may turn a picture; TIFF has it among its tags."""


def decode_pixels(data: bytes, suffix: str) -> np.ndarray:
    """``[C, H, W]`` uint8 of an image file in a shard, C 1 or 3; any exception means it cannot be decoded."""
    picture = _open(data, (PIL_FORMATS[suffix],), f"a {PIL_FORMATS[suffix]}")
    grey = picture.mode in GREY_MODES
    if not grey and picture.mode not in COLOUR_MODES:  # 16-bit greys: converting would clip them
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 bits a channel")
    picture = _on_white(_upright(picture))
    if grey:
        return np.array(picture.convert("L"))[None]
    return np.ascontiguousarray(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


def open_rgb(data: bytes) -> Image.Image:
    """An upright RGB picture of any still image; any exception means it cannot be read.

    EXIF rotation is applied, 16-bit grey is scaled to 8 bits, CMYK and palettes become RGB, transparency is laid on
    white.  An animated image is refused, since none of its frames is *the* image.
    """
    if not data:
        raise ValueError("the file is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"the file has {len(data)} bytes; at most {MAX_IMAGE_BYTES >> 20} MiB are read")
    picture = _upright(_open(data, RAW_FORMATS, "an image"))
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(np.round(np.asarray(picture, np.float64) / 257).astype(np.uint8))
    if picture.mode not in (*GREY_MODES, *COLOUR_MODES, "La", "RGBa", "LAB", "HSV"):
        raise ValueError(f"pixel mode {picture.mode} has no known range")
    return _on_white(picture).convert("RGB")


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The middle ``size`` x ``size`` pixels after the shorter side was brought to ``size``; uint8 ``[3, H, W]``.

    As in ADM (arXiv 2105.05233, its released data loader), on which the published FIDs rest: halved by averaging
    while both sides stay at least twice the size, then resized bicubically.  Raises ``ValueError`` for a strip so long
    that it would become larger than any image may be.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    _check_area(width, height)  # a strip of a hundred bytes would take gigabytes
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    crop = np.asarray(picture)[top : top + size, left : left + size]
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def png(image_CHW: np.ndarray) -> bytes:
    """A uint8 image as PNG."""
    buffer = io.BytesIO()
    pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _upright(picture: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF or XMP says; looking for them in a small picture would take long."""
    picture.load()  # a PNG may say so behind its pixels
    if picture.format == "TIFF" or not picture.info.keys().isdisjoint(ORIENTATION_KEYS):
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture as it is, unless something of it is transparent."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _open(data: bytes, formats: tuple[str, ...], kind: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it does not begin as {kind} file") from None
    _check_area(*picture.size)
    # MPO is what cameras call a JPEG with a second, smaller view behind the photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ValueError(f"it is animated, with {picture.n_frames} frames; expected a still image")
    return picture


def _check_area(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width}x{height} pixels could be a decompression bomb")
