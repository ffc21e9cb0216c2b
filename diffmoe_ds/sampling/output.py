"""Write the results of a complete set of images: ADM's ``samples.npz``, PNG files, GenEval's folders, a grid.

Legend: N images, B images of a shard, H, W height and width, C channels.
"""

from __future__ import annotations

import csv
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.npy import write_array
from diffmoe_ds.sampling.grid import Pixels

SAMPLES, PNG, GENEVAL, GRID, PROMPTS = "samples.npz", "png", "geneval", "grid.png", "prompts.txt"
"""Names of the results."""
LABELS = "labels.csv"
"""Labels of the images in a folder of PNG files."""
HEADER, PROMPT_HEADER = "file,label", "file,label,prompt"
"""First line of the labels, without and with prompts."""
PNG_NAME = re.compile(r"[0-9]{6,}\.png")
"""What `png_name` returns."""
METADATA, GENEVAL_SAMPLES = "metadata.jsonl", "samples"
"""What GenEval's folder of a prompt holds."""
GENEVAL_FOLDER, GENEVAL_NAME = re.compile("[0-9]{5,}"), re.compile(r"[0-9]{4,}\.png")
"""GenEval's folder of a prompt, and the images in it."""


def write_npz(path: Path, shape: tuple[int, ...], parts: Iterable[Pixels], labels_N: Pixels) -> None:
    """Write the same bytes as ``np.savez(path, arr_0=images, arr_1=labels)``, holding one part in memory at a time.

    Args:
        path: a new file.
        shape: (N, H, W, C) of all images.
        parts: uint8 [B, H, W, C] parts of the images, in order.
        labels_N: int64.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                write_array(member, shape, np.dtype(np.uint8), parts)
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                write_array(member, labels_N.shape, labels_N.dtype, [labels_N])
        file.flush()
        os.fsync(file.fileno())


def write_pngs(folder: Path, images: range, pixels: Pixels, num_images: int) -> None:
    """Write images as PNG files whose names sort by index.

    Args:
        folder: an existing folder.
        images: their indices.
        pixels: uint8 [B, H, W, C] with one or three channels.
        num_images: N.

    Raises:
        OSError: a file cannot be written.
    """
    for index, image in zip(images, pixels, strict=True):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(folder / png_name(index, num_images))


def png_name(index: int, num_images: int) -> str:
    """Return the name of an image's PNG file."""
    return f"{index:0{max(6, len(str(num_images - 1)))}d}.png"


def write_labels(folder: Path, labels: Sequence[int], prompts: Sequence[str] = ()) -> None:
    """Write the labels of a folder of PNG files, one line per image.

    Args:
        folder: an existing folder.
        labels: one per image.
        prompts: the prompt of each label, for images of a text model.

    Raises:
        OSError: the file cannot be written.
    """
    (folder / LABELS).unlink(missing_ok=True)  # of a killed run
    with open(folder / LABELS, "x", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow((PROMPT_HEADER if prompts else HEADER).split(","))
        for index, label in enumerate(labels):
            rows.writerow([png_name(index, len(labels)), label, *([prompts[label]] if prompts else [])])


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write prompts, one line each; line breaks within a prompt become spaces.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text("".join(" ".join(prompt.splitlines()) + "\n" for prompt in prompts), encoding="utf-8")


def write_geneval(folder: Path, images: range, pixels: Pixels, num_prompts: int) -> None:
    """Write images as PNG files in the folders of their prompts, as GenEval's evaluator reads them.

    Args:
        folder: an existing folder.
        images: their indices; image k has prompt ``k % num_prompts``.
        pixels: uint8 [B, H, W, C] with one or three channels.
        num_prompts: number of prompts.

    Raises:
        OSError: a file cannot be written.
    """
    for index, image in zip(images, pixels, strict=True):
        samples = folder / f"{index % num_prompts:05d}" / GENEVAL_SAMPLES
        samples.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(samples / f"{index // num_prompts:04d}.png")


def write_metadata(folder: Path, lines: Sequence[str]) -> None:
    """Write GenEval's description of each prompt into its folder, which exists.

    Raises:
        OSError: a file cannot be written.
    """
    for number, line in enumerate(lines):
        (folder / f"{number:05d}" / METADATA).write_text(line + "\n", encoding="utf-8")


def check_targets(out: Path, outputs: Sequence[str]) -> None:
    """Check that the results can replace what is in the output directory.

    Args:
        out: the directory; it may not exist.
        outputs: `SAMPLES`, `PNG`, `GENEVAL`.

    Raises:
        ConfigError: the directory is a file, or holds something that would have to be removed but is not a result.
    """
    if os.path.isfile(out):
        raise ConfigError(f"--out {out} is a file; pass a directory.")
    for name in (SAMPLES, GRID, PROMPTS):  # samples.npz of an earlier run is removed even if it is not written
        if os.path.isdir(out / name):
            raise ConfigError(f"{out / name} is a directory; pass another --out or move it away.")
    for name in {*outputs} & {PNG, GENEVAL}:
        check_folder(out / name)


def check_folder(folder: Path) -> None:
    """Check that a folder of images may be replaced: it must be missing, empty or written by diffmoe.

    Args:
        folder: its name is `PNG` or `GENEVAL`.

    Raises:
        ConfigError: it holds other files, is not a folder or cannot be read.
    """
    if os.path.lexists(folder) and not is_result(folder) and not _is_empty(folder):
        raise ConfigError(f"{folder} exists but was not written by diffmoe; pass another --out or move it away.")


def is_result(path: Path) -> bool:
    """Return whether a path with the name of a result holds nothing but that result, so that it may be removed."""
    if path.name == PNG:
        return is_png_folder(path)
    return is_geneval_folder(path) if path.name == GENEVAL else path.is_file()


def is_geneval_folder(folder: Path) -> bool:
    """Return whether a folder holds what `write_geneval` and `write_metadata` write, and nothing else."""
    try:
        folders = list(folder.iterdir())
        return bool(folders) and all(
            GENEVAL_FOLDER.fullmatch(path.name)
            and {each.name for each in path.iterdir()} == {METADATA, GENEVAL_SAMPLES}
            and all(GENEVAL_NAME.fullmatch(each.name) for each in (path / GENEVAL_SAMPLES).iterdir())
            for path in folders
        )
    except OSError:
        return False


def is_png_folder(folder: Path) -> bool:
    """Return whether a folder holds what `write_pngs` and `write_labels` write, and nothing else."""
    try:
        names = {path.name for path in folder.iterdir()} - {LABELS}
        with open_regular(folder / LABELS) as file:
            header = file.readline(len(PROMPT_HEADER) + 2)
    except OSError:
        return False
    known = [f"{line}\n".encode() for line in (HEADER, PROMPT_HEADER)]
    return header in known and all(PNG_NAME.fullmatch(name) for name in names)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:  # a file, or unreadable
        return False
