"""Build the embedded shard: the first images of each class of Fashion-MNIST's training set, as a WebDataset.

    python -m tools.make_fashion_shard usr/share/datasets/fashion-mnist fashion-mnist-00000.tar.gz

The output depends only on the input, Pillow and zlib: the shard contains no time, user or path.
"""

import argparse
import gzip
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from diffmoe_ds.errors import DataError


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


def write_shard(source: Path, output: Path, per_class: int = 1000) -> int:
    """Write the first ``per_class`` training images of each class in their original order.

    A sample's key is ``train-`` and the image's index in the original training set.

    Returns:
        The number of images.
    """
    images = read_idx(source, "train-images-idx3-ubyte")
    labels = read_idx(source, "train-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise DataError(f"{source} contains {len(images)} images but {len(labels)} labels; the numbers must be equal")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)]))
    with (
        open(output, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as packed,
        webdataset.TarWriter(packed, encoder=False, user="", group="", mtime=0) as writer,
    ):
        for index in kept.tolist():
            label = str(labels[index]).encode("ascii")
            writer.write({"__key__": f"train-{index:05d}", "png": png(images[index]), "cls": label})
    return len(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the shard; exit with code 4 if the input is not usable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with train-{images-idx3,labels-idx1}-ubyte[.gz]")
    parser.add_argument("output", type=Path, help="the .tar.gz to write")
    parser.add_argument("--per-class", type=int, default=1000, help="images of each class (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        count = write_shard(options.source, options.output, options.per_class)
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{options.output}: {count} samples, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
