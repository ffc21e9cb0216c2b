"""From the bytes of an image file to pixels: what is accepted, what is refused, and the crop that training takes.

Training reads shards strictly (`decode_pixels`): an image there was prepared, so anything odd is an error.
Preparation and raw folders take what cameras and the web produce (`open_rgb`), and count what cannot be read.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_BYTES = 64 << 20
PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
RAW_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""By content and not by suffix: ImageNet has a PNG that is called .JPEG."""
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode_pixels(data: bytes, suffix: str) -> np.ndarray:
    """``[C, H, W]`` uint8 of an image file in a shard, C 1 or 3; any exception means it cannot be decoded."""
    picture = _open(data, (PIL_FORMATS[suffix],), f"a {PIL_FORMATS[suffix]}")
    if picture.mode in GREY_MODES:
        return np.array(picture.convert("L"))[None]
    if picture.mode not in COLOUR_MODES:  # 16-bit greys: converting would clip them
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 bits a channel")
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
    picture = _open(data, RAW_FORMATS, "an image")
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(np.round(np.asarray(picture, np.float64) / 257).astype(np.uint8))
    if picture.mode not in (*GREY_MODES, *COLOUR_MODES, "La", "RGBa", "LAB", "HSV"):
        raise ValueError(f"pixel mode {picture.mode} has no known range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The middle ``size`` x ``size`` pixels after the shorter side was brought to ``size``; uint8 ``[3, H, W]``.

    As in ADM (arXiv 2105.05233, its released data loader), on which the published FIDs rest: halved by averaging
    while both sides stay at least twice the size, then resized bicubically.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    crop = np.asarray(picture)[top : top + size, left : left + size]
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def png(image_CHW: np.ndarray) -> bytes:
    """A uint8 image as PNG."""
    buffer = io.BytesIO()
    pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _open(data: bytes, formats: tuple[str, ...], kind: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it does not begin as {kind} file") from None
    if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels could be a decompression bomb")
    # MPO is what cameras call a JPEG with a second, smaller view behind the photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ValueError(f"it is animated, with {picture.n_frames} frames; expected a still image")
    return picture
