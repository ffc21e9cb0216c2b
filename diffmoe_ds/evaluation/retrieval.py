"""Retrieval precision: how often the image of a captioned dataset nearest to a generated one has its prompt.

Legend: N generated images, n those of this rank, B of a block, R images of the dataset, F features, K nearest images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.data.captions import open_captions
from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation.images import FileImages, open_images
from diffmoe_ds.evaluation.metrics import proportion_interval
from diffmoe_ds.evaluation.sharded import BLOCK_ROWS, ShardedRows
from diffmoe_ds.rng import evaluation_stream
from diffmoe_ds.text import counted, shortened

NEAREST = 5
"""K of the top-5 precision."""
CONTROLS = 20
"""Derangements whose precisions are averaged."""
CONTROL_STREAM = 2_000_000
"""Stream of the first derangement."""


class CaptionedImages(NamedTuple):
    """The dataset from which images are retrieved. Prompts are numbered in order of appearance."""

    images: FileImages
    """Its images, in the size of the generated ones."""
    captions: list[frozenset[int]]
    """Which prompts are captions of each of them."""
    prompts: list[int]
    """The prompt of each generated image."""


def open_captioned(path: str, prompts: Sequence[str], size: tuple[int, int]) -> CaptionedImages:
    """Open the dataset of ``--retrieval``.

    Args:
        path: shards or a folder, with captions.
        prompts: of the generated images. They are compared with captions ignoring case and whitespace.
        size: height and width of the generated images.

    Raises:
        DataError: it cannot be read, an image has no caption, or no prompt is a caption.
    """
    images = open_images(path, size, "--retrieval")
    if not isinstance(images, FileImages):
        raise DataError(f"--retrieval {path}: an .npz file has no captions; expected a folder or shards.")
    numbers: dict[str, int] = {}
    labels = [numbers.setdefault(_normalized(prompt), len(numbers)) for prompt in prompts]
    source = open_captions(images.source)
    try:
        found = [map(_normalized, source.captions(index)) for index in range(len(images))]
    except DataError as error:
        raise DataError(f"--retrieval {path}: {str(error).rstrip('.')}.") from None
    captions = [frozenset(numbers[caption] for caption in of if caption in numbers) for of in found]
    if not any(captions):
        raise DataError(
            f"--retrieval {path}: its captions include none of the {counted(len(numbers), 'prompt')}, such as "
            f"{shortened(prompts[0])!r}; generate images from its captions."
        )
    return CaptionedImages(images, captions, labels)


def nearest_images(samples: ShardedRows, reference: ShardedRows) -> Tensor:
    """Return the nearest images of the dataset by cosine similarity, best first. Every rank must call this.

    Args:
        samples: features of the generated images, [N, F].
        reference: features of the dataset, [R, F].

    Returns:
        Their indices, int64 [N, K] with K at most R. Ties go to the first images.
    """
    count = min(NEAREST, len(reference))
    samples_nF = _unit(samples.local)
    score_nK = torch.full((len(samples_nF), count), -np.inf)  # fp32, so that equal images tie despite rounding
    index_nK = torch.zeros(len(samples_nF), count, dtype=torch.int64)
    for block in reference.blocks():
        block_BF = _unit(block.rows_BF)
        index_B = torch.arange(block.start, block.start + len(block_BF))
        for first in range(0, len(samples_nF), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            scores = torch.cat([score_nK[rows], (samples_nF[rows] @ block_BF.T).float()], 1)
            indices = torch.cat([index_nK[rows], index_B.expand(len(scores), -1)], 1)
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
            score_nK[rows], index_nK[rows] = scores.gather(1, best), indices.gather(1, best)
    return torch.stack([samples.gathered(column_n) for column_n in index_nK.T], 1)


def retrieval_metrics(nearest_NK: Tensor, dataset: CaptionedImages) -> dict[str, Any]:
    """Return the metrics under the names of ``diffmoe evaluate --json``.

    The control is the mean precision after shuffling the prompts: each is replaced by another one for all its images.
    It is None if all images have the same prompt.

    Args:
        nearest_NK: from `nearest_images`.
        dataset: of `open_captioned`.
    """
    captions = dataset.captions
    known = frozenset().union(*captions)
    counts = [
        (prompt, row) for prompt, row in zip(dataset.prompts, nearest_NK.tolist(), strict=True) if prompt in known
    ]
    precision = _fraction(prompt in captions[row[0]] for prompt, row in counts)
    top = _fraction(any(prompt in captions[index] for index in row) for prompt, row in counts)
    distinct = sorted({prompt for prompt, _ in counts})
    controls = []
    for number in range(CONTROLS if len(distinct) > 1 else 0):
        order = evaluation_stream(0, CONTROL_STREAM + number).permutation(distinct)
        other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        controls.append(_fraction(other[prompt] in captions[row[0]] for prompt, row in counts))
    return {
        "retrieval_precision": precision,
        "retrieval_precision_interval": list(proportion_interval(precision, len(counts))),
        "retrieval_top5": top,
        "retrieval_control": float(np.mean(controls)) if controls else None,
        "retrieval_n": len(counts),
        "retrieval_n_reference": len(captions),
    }


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _unit(rows_NF: Tensor) -> Tensor:
    """Return rows of length 1, fp64."""
    return torch.nn.functional.normalize(rows_NF.double(), dim=1)


def _fraction(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))
