"""The prompts of evaluated images: those that ``diffmoe sample`` writes, or captions of a dataset.

Legend: N images.
"""

from __future__ import annotations

import numpy as np

from diffmoe_ds.control_files import read_text
from diffmoe_ds.data.captions import open_captions
from diffmoe_ds.data.sources.folder import ImageFolder
from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation.images import FileImages, Images, NpzImages
from diffmoe_ds.evaluation.npz import NpzReader
from diffmoe_ds.sampling.output import LABELS, PROMPTS
from diffmoe_ds.text import counted, reason

EXPECTED = "expected the results of diffmoe sample with prompts, or images with captions"


def prompts_of(images: Images) -> list[str]:
    """Return the prompt of each image of ``--samples``: as written by ``diffmoe sample``, or its first caption.

    Raises:
        DataError: an image has no prompt, or the prompts cannot be read.
    """
    if isinstance(images, NpzImages):
        return _prompts_of_npz(images.reader, len(images))
    assert isinstance(images, FileImages), type(images)
    table = images.source.folder / LABELS if isinstance(images.source, ImageFolder) else None
    try:
        captions = open_captions(images.source, str(table) if table is not None and table.is_file() else None)
        return [captions.captions(index)[0] for index in range(len(images))]
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; {EXPECTED}.") from None


def _prompts_of_npz(reader: NpzReader, count: int) -> list[str]:
    """Return the prompts whose numbers are in an .npz file; the prompts are in a file next to it."""
    file = reader.path.parent / PROMPTS
    try:
        prompts = read_text(file).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{reader.path}: its prompts {file} cannot be read: {reason(error)}; {EXPECTED}.") from None
    header = reader.header("arr_1")
    if header.dtype != np.int64 or header.shape != (count,):
        raise DataError(
            f"{reader.path}: arr_1 is {header.describe()}; expected the number of each image's prompt, int64 [{count}]."
        )
    labels_N = reader.array("arr_1", 8 * count)
    outside = labels_N[(labels_N < 0) | (labels_N >= len(prompts))]
    if len(outside):
        raise DataError(
            f"{reader.path}: an image has prompt {outside[0]}, but {file} has {counted(len(prompts), 'prompt')}."
        )
    return [prompts[label] for label in labels_N.tolist()]
