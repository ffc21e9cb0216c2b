"""Prepare a small labelled colour dataset from the npm package `emoji-datasource-google` (tested with 16.0.0).

    npm pack emoji-datasource-google@16.0.0
    python -m examples.emoji.prepare_emoji emoji-datasource-google-16.0.0.tgz    # writes the directory emoji

The images are Google's Noto Emoji (Apache-2.0), 64x64 pixels; alpha is composited onto white.  Labels are Unicode
categories; captions are the emoji names.  With `--text`, every picture has several captions, see `captions.py`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.prepare import add_output_arguments, prepare
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.data.prepare.encoders import PixelEncoder
from diffmoe_ds.data.prepare.preparation import Preparation
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import ConfigError, DataError
from examples.emoji.captions import captions, distinct

SIZE = 64
NO_CLASS = "Component"
"""Isolated skin tones; the other nine Unicode categories are the classes."""
LEVELS = ("category", "subcategory")
PICTURES = f"img/google/{SIZE}"
MAX_JSON_BYTES = 64 << 20


class Picture(NamedTuple):
    """One picture of the package."""

    file: str
    entry: dict[str, Any]
    """Its entry in `emoji.json`."""
    tones: str
    """Code points of its skin tones, joined by dashes; empty without them."""


class Emoji:
    """The emoji of a package as a `folder.Source` with captions."""

    def __init__(self, package: Path, skin_tones: bool = False, categories: Collection[str] = ()) -> None:
        """Read the package.

        Args:
            package: the unpacked package, a folder whose `node_modules` contains it, or the `.tgz`.
            skin_tones: add the skin tone variants, which double the number of images.
            categories: the categories and subcategories to include; everything if empty.

        Raises:
            DataError: the package is missing or has an unexpected layout.
            ConfigError: a category is unknown.
        """
        self._read = _reader(package)
        entries = self._entries(package)
        entries = [entry for entry in entries if entry["category"] != NO_CLASS]
        known = sorted({entry[level] for level in LEVELS for entry in entries})
        for name in categories:
            if name not in known:
                raise ConfigError(unknown("--categories", name, known))
        entries = [row for row in entries if not categories or {row[level] for level in LEVELS} & {*categories}]
        self.classes = sorted({entry["category"] for entry in entries})
        rows: list[Picture] = []
        for entry in entries:
            pictures = {"": entry, **(entry.get("skin_variations", {}) if skin_tones else {})}
            for tones, picture in pictures.items():
                if picture.get("has_img_google"):
                    rows.append(Picture(picture["image"], entry, tones))
        if not rows:
            raise DataError(f"{package}/emoji.json lists no images; expected entries with image, name and category")
        self._keep(sorted(rows, key=lambda row: row.file))

    def _keep(self, rows: list[Picture]) -> None:
        """Set the pictures, and the category of each."""
        self._rows = rows
        self.labels = np.array([self.classes.index(row.entry["category"]) for row in rows], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Return the code points, such as `1f600`."""
        return self._rows[index].file.removesuffix(".png")

    def name(self, index: int) -> str:
        """Return the name in lower case, such as `grinning face`."""
        name: str = self._rows[index].entry["name"].lower()
        return name

    def describe(self, index: int) -> str:
        """Return the file of an emoji, for messages."""
        return f"picture {PICTURES}/{self._rows[index].file}"

    def suffix(self, index: int) -> str:
        """Return the format of an emoji."""
        return "png"

    def image_bytes(self, index: int) -> bytes:
        """Return the PNG of an emoji.

        Raises:
            DataError: the package does not contain it.
        """
        return self._read(f"{PICTURES}/{self._rows[index].file}")

    def captions(self) -> dict[str, list[str]]:
        """Keep one picture of each drawing, and return its captions, those of all pictures with this drawing, by key.

        Raises:
            DataError: a picture is missing or cannot be decoded.
        """
        pixels = {self.key(index): self._pixels(index) for index in range(len(self))}
        firsts, found = distinct(pixels), dict[str, list[str]]()
        for index, row in enumerate(self._rows):
            key = self.key(index)
            found.setdefault(firsts[key], []).extend(captions(row.entry, row.tones, pixels[key]))
        self._keep([row for row in self._rows if row.file.removesuffix(".png") in found])
        return {key: list(dict.fromkeys(each)) for key, each in found.items()}

    def _pixels(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.image_bytes(index))) as image:
                return np.asarray(image.convert("RGBA").resize((SIZE, SIZE)))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.describe(index)} cannot be decoded: {error}") from None

    def _entries(self, package: Path) -> list[dict[str, Any]]:
        try:
            entries: list[dict[str, Any]] = json.loads(self._read("emoji.json"))
            for entry in entries:
                for picture in (entry, *entry.get("skin_variations", {}).values()):
                    name = picture["image"]
                    if not name.endswith(".png") or not name.removesuffix(".png").replace("-", "").isalnum():
                        raise ValueError(f"invalid file name {name!r}")
                if not all(isinstance(entry[key], str) for key in ("name", *LEVELS)):
                    raise ValueError("name, category and subcategory must be text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{package}/emoji.json is not from emoji-datasource-google: {error!r}") from None
        return entries


def _reader(package: Path) -> Callable[[str], bytes]:
    """Return a function that reads a file of the package."""
    package = package.expanduser()
    if package.is_file():
        return _Archive(package)
    nested = (package, package / "package", package / "node_modules" / "emoji-datasource-google")
    folder = next((p for p in nested if (p / "emoji.json").is_file() and (p / PICTURES).is_dir()), None)
    if folder is None:
        raise DataError(
            f"{package} is not emoji-datasource-google: expected emoji.json and {PICTURES}/, or the .tgz; "
            "download it with npm pack emoji-datasource-google@16.0.0"
        )

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}") from None

    return read


class _Archive:
    """The required files of a package's `.tgz`, in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:gz") as tar:
                for member in tar:
                    name = member.name.partition("/")[2]  # npm stores all files in package/
                    wanted = name == "emoji.json" or name.rpartition("/")[0] == PICTURES
                    if member.isreg() and wanted and member.size <= MAX_JSON_BYTES:
                        stream = tar.extractfile(member)
                        assert isinstance(stream, io.BufferedIOBase)
                        self._files[name] = stream.read()
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise DataError(f"{path} is not a complete .tgz of emoji-datasource-google: {error}") from None

    def __call__(self, name: str) -> bytes:
        if name not in self._files:
            raise DataError(f"{self._path} does not contain {name}; expected emoji-datasource-google 16.0.0")
        return self._files[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the emoji, in one or more processes, and return the exit code."""
    parser = argparse.ArgumentParser(description="Prepare 64x64 colour images with 9 classes and captions.")
    parser.add_argument("path", type=Path, metavar="PATH", help="emoji-datasource-google, unpacked or as .tgz")
    parser.add_argument("--skin-tones", action="store_true", help="include skin tone variants")
    text = "write several captions per picture, and identical drawings only once, for `diffmoe prepare text`"
    parser.add_argument("--text", action="store_true", help=text)
    text = "categories and subcategories, separated by commas, such as 'Activities,food-fruit' (default: all)"
    parser.add_argument("--categories", default="", metavar="A,B", help=text)
    add_output_arguments(parser, Path("emoji"))
    parser.set_defaults(run=lambda args: prepare(args, _preparation))
    return run_command(parser.parse_args(argv))


def _preparation(args: argparse.Namespace, launch: Launch) -> Preparation:
    categories = [name.strip() for name in args.categories.split(",") if name.strip()]
    source = Emoji(args.path, args.skin_tones, categories)
    encoder = PixelEncoder(SIZE, args.threads)
    every = source.captions() if args.text else None

    def found(index: int) -> list[str]:
        return [source.name(index)] if every is None else every[source.key(index)]

    return Preparation(source, encoder, args.out, args.shard_images, args.max_unreadable, found)


if __name__ == "__main__":
    sys.exit(main())
