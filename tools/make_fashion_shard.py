"""Build a WebDataset shard of Fashion-MNIST: by default the embedded one, with the first training images per class.

    python -m tools.make_fashion_shard usr/share/datasets/fashion-mnist fashion-mnist-00000.tar.gz
    python -m tools.make_fashion_shard --split train --per-class 0 usr/share/datasets/fashion-mnist train.tar
    python -m tools.make_fashion_shard --split test --per-class 0 usr/share/datasets/fashion-mnist test.tar

The output depends only on the input, Pillow and zlib: the shard contains no time, user or path.
"""

import argparse
import gzip
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import webdataset
from PIL import Image

from diffmoe_ds.errors import DataError

FILES = {"train": "train", "test": "t10k"}
"""Split -> prefix of its idx files."""


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read ``folder/name`` or ``folder/name.gz`` in the idx format.

    Returns:
        A uint8 array with the shape that the header gives.

    Raises:
        DataError: neither file exists, or it is not a complete idx file of unsigned bytes.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder} contains neither {name} nor {name}.gz; expected Fashion-MNIST's idx files")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    # Two zero bytes, the type (8 is uint8), the number of axes, then each axis as a big-endian 32-bit integer.
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = np.frombuffer(data[4 : 4 + 4 * axes], ">u4").tolist()
    if not axes or len(shape) != axes or len(data) != 4 + 4 * axes + np.prod(shape, dtype=int):
        raise DataError(f"{path} ({len(data)} bytes) is not a complete idx file of unsigned bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def png(image: np.ndarray) -> bytes:
    """Encode a uint8 [H, W] image as PNG without compression, so that gzip can compress across images."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_shard(source: Path, output: Path, per_class: int = 1000, split: str = "train") -> int:
    """Write the first images of each class in their original order.

    A sample's key is the split and the image's index in it, such as ``train-00000``.

    Args:
        source: directory with the idx files.
        output: the shard; compressed if its name ends in ``.gz``.
        per_class: images per class; 0 for all.
        split: ``train`` or ``test``.

    Returns:
        The number of images.

    Raises:
        DataError: the idx files are missing or invalid.
    """
    images = read_idx(source, f"{FILES[split]}-images-idx3-ubyte")
    labels = read_idx(source, f"{FILES[split]}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise DataError(f"{source} contains {len(images)} images but {len(labels)} labels; the numbers must be equal")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[: per_class or None] for c in np.unique(labels)]))
    with (
        open_output(output) as file,
        webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0) as writer,
    ):
        for index in kept.tolist():
            label = str(labels[index]).encode("ascii")
            writer.write({"__key__": f"{split}-{index:05d}", "png": png(images[index]), "cls": label})
    return len(kept)


@contextmanager
def open_output(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file for writing, gzip-compressed without a time or name if it ends in ``.gz``."""
    with open(path, "wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as packed:
            yield packed


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the shard; exit with code 4 if the input is not usable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]")
    parser.add_argument("output", type=Path, help="the .tar.gz or .tar to write")
    text = "images per class; 0 for all (default: %(default)s)"
    parser.add_argument("--per-class", type=int, default=1000, metavar="N", help=text)
    parser.add_argument("--split", choices=FILES, default="train", help="images to use (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.per_class < 0:
        parser.error(f"--per-class must be non-negative, got {options.per_class}")
    try:
        count = write_shard(options.source, options.output, options.per_class, options.split)
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{options.output}: {count} samples, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
