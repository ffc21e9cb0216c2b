"""Figures of generated images: by class or prompt, and by guidance scale.

Legend: N images, G guidance scales, H, W height and width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffmoe_ds.evaluation.report.facts import Nouns
from diffmoe_ds.evaluation.report.probe import Probe
from diffmoe_ds.evaluation.report.style import Drawing, PictureRow, picture_sheet, wrapped
from diffmoe_ds.sampling.grid import Pixels

SHOWN_CLASSES = 10
"""Largest number of classes in a figure."""
SHOWN_SEEDS = 8
"""Largest number of images of a class in a figure."""


def class_drawing(probe: Probe, names: Mapping[int, str], nouns: Nouns, first_seed: int, settings: str) -> Drawing:
    """Draw images by class or prompt, with the same seeds for all of them.

    Args:
        probe: images whose labels cycle: all labels of the first seed, then all of the second one, and so on.
        names: names of the classes by label, or the prompts.
        nouns: which of these.
        first_seed: seed of the first image of each label.
        settings: sampler and guidance, for the caption.
    """
    one, many = nouns
    labels = list(dict.fromkeys(probe.label_N.tolist()))
    shown = [labels[i] for i in np.unique(np.linspace(0, len(labels) - 1, SHOWN_CLASSES).astype(int))]
    rows = []
    for label in shown:
        found = np.flatnonzero(probe.label_N == label)[:SHOWN_SEEDS]
        rows.append(PictureRow(wrapped(names[label], 16, lines=4), [probe.picture_NHWC[i] for i in found]))
    columns = max(len(row.pictures) for row in rows)
    heads = [f"seed {first_seed + column}" for column in range(columns)]
    which = "" if len(shown) == len(labels) else f"{len(shown)} of {len(labels)} {many}. "
    caption = (
        f"{which}One row per {one}; the images in a column start from the same noise, so they differ only in the "
        f"{one}. {settings}; not cherry-picked."
    )
    return picture_sheet(f"samples_by_{one}", f"Generated images by {one}", caption, rows, heads)


def guidance_drawing(
    pictures_G: Mapping[float, Pixels], labels: Sequence[int], names: Mapping[int, str], nouns: Nouns, settings: str
) -> Drawing:
    """Draw the same images at several guidance scales.

    Args:
        pictures_G: uint8 [N, H, W, C] of each scale.
        labels: classes or prompts of the N images.
        names: see `class_drawing`.
        nouns: see `class_drawing`.
        settings: sampler and seed, for the caption.
    """
    rows = [PictureRow(f"{scale:g}", list(pictures)) for scale, pictures in pictures_G.items()]
    caption = (
        f"Rows: guidance scale, where 1 disables guidance; columns: one {nouns.one} each, with the same noise in every "
        f"row. {settings}. Larger scales give more typical but less diverse images, and eventually artifacts."
    )
    return picture_sheet(
        "samples_by_guidance", "Generated images by guidance scale", caption, rows, [names[label] for label in labels]
    )
