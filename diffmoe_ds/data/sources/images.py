"""Decode image files to pixels, and crop them for training.

Training reads shards strictly (`decode_pixels`): the suffix must match the format, with 8 bits per channel.
Preparation and raw folders accept what cameras and the web produce (`open_rgb`).  Both apply the EXIF orientation and
composite alpha onto white.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_BYTES = 64 << 20
MAX_SIDE = 65_535
"""Largest width or height, that of JPEG; rows of a pixel or two would take several times the memory of the pixels."""
MAX_WEBP_PIXELS = 62_000_000
"""Most pixels of a WebP, of which its library keeps several copies."""
MAX_SCANS = 100
"""Most scans of a JPEG, each of which is a pass over all pixels that takes a few bytes; usual are 1 to 20."""
MAX_READS = 1 << 19
"""Most reads of a file, one or more for every chunk, marker, tag or run of pixels that Pillow decodes in Python."""
JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""A marker of a JPEG that begins a segment or ends the image."""
JPEG_SCAN, JPEG_END = 0xDA, 0xD9
STRIP_PIXELS = 1 << 20
"""Pixels that are composited together, so that a large image does not take several times its memory."""
PIL_FORMATS = {
    "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP",
    "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
}  # fmt: skip
RAW_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Detected by content, not by suffix: ImageNet contains a PNG named .JPEG."""
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Where Pillow stores the orientation; TIFF has it among its tags."""


def decode_pixels(data: bytes, suffix: str) -> np.ndarray:
    """Decode an image file of a shard to uint8 [C, H, W], C 1 or 3; any exception means that it is invalid."""
    picture = _open(data, (PIL_FORMATS[suffix],), f"a {PIL_FORMATS[suffix]}")
    grey = picture.mode in GREY_MODES
    if not grey and picture.mode not in COLOUR_MODES:  # 16-bit grey: converting would clip it
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 bits per channel")
    picture = _on_white(_upright(picture))
    if grey:
        return np.array(_converted(picture, "L"))[None]
    return np.ascontiguousarray(np.asarray(_converted(picture, "RGB")).transpose(2, 0, 1))


def open_rgb(data: bytes) -> Image.Image:
    """Decode any still image to RGB; any exception means that it is invalid.

    EXIF rotation is applied, 16-bit grey is scaled to 8 bits, CMYK and palettes are converted to RGB, and alpha is
    composited onto white.  Animated images are refused, because it is unclear which frame to use.
    """
    if not data:
        raise ValueError("the file is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"the file has {len(data)} bytes; the limit is {MAX_IMAGE_BYTES >> 20} MiB")
    picture = _upright(_open(data, RAW_FORMATS, "an image"))
    if picture.mode.startswith("I;16"):
        pixels = np.asarray(picture).astype(np.uint32)  # rounded in place: floats would take four times the memory
        pixels += 257 // 2
        pixels //= 257
        picture = Image.fromarray(pixels.astype(np.uint8))
    if picture.mode not in (*GREY_MODES, *COLOUR_MODES, "La", "RGBa", "LAB", "HSV"):
        raise ValueError(f"pixel mode {picture.mode} has no known range")
    return _converted(_on_white(picture), "RGB")


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and crop the center; uint8 [C, size, size], C 1 or 3.

    The resizing is that of ADM's released data loader (arXiv 2105.05233), on which published FIDs are based: halve by
    averaging while both sides are at least twice the size, then resize bicubically.

    Raises:
        ValueError: the image is so elongated that the resized one would exceed Pillow's limit.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    _check_area(width, height)  # a file of a hundred bytes could need gigabytes
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    crop = np.atleast_3d(np.asarray(picture))[top : top + size, left : left + size]
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def png(image_CHW: np.ndarray) -> bytes:
    """Encode a uint8 image [C, H, W] as PNG."""
    buffer = io.BytesIO()
    pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the orientation in EXIF or XMP; checked first, because parsing is slow for small images."""
    picture.load()  # in a PNG the orientation may come after the pixels
    if picture.format == "TIFF" or not picture.info.keys().isdisjoint(ORIENTATION_KEYS):
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    """Composite alpha onto white."""
    if not picture.has_transparency_data:
        return picture
    flat = Image.new("RGB", picture.size)
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    """Convert an image unless it has the mode already; Pillow would copy it."""
    return picture if picture.mode == mode else picture.convert(mode)


class _BoundedFile(io.BytesIO):
    """An image file that ends a loop over millions of its parts."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError(f"it has more than {MAX_READS:,} parts")
        return super().read(size)


def _open(data: bytes, formats: tuple[str, ...], kind: str) -> Image.Image:
    try:
        picture = Image.open(_BoundedFile(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it does not start like {kind} file") from None
    _check_area(*picture.size)
    if picture.format == "WEBP" and picture.width * picture.height > MAX_WEBP_PIXELS:
        raise ValueError(f"a WebP of {picture.width}x{picture.height} pixels could be a decompression bomb")
    # MPO is a camera's JPEG followed by a second, smaller view of the same photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ValueError("it is animated, with several frames; expected a still image")  # counting them may take hours
    if picture.format in ("JPEG", "MPO") and _has_many_scans(data):
        raise ValueError(f"it has more than {MAX_SCANS} scans and could be a decompression bomb")
    return picture


def _has_many_scans(data: bytes) -> bool:
    """Return whether a JPEG has more than `MAX_SCANS` scans.

    Its metadata, and the video that phones append to a photograph, may contain the bytes of the marker by chance.
    """
    if data.count(bytes((0xFF, JPEG_SCAN))) <= MAX_SCANS:
        return False
    scans, start = 0, 2
    for _ in range(MAX_READS):
        marker = JPEG_SEGMENT.search(data, start)
        if marker is None or marker[0][1] == JPEG_END:
            return False
        scans += marker[0][1] == JPEG_SCAN
        if scans > MAX_SCANS:
            return True
        start = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return True


def _check_area(width: int, height: int) -> None:
    too_large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
    if too_large or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels could be a decompression bomb")
