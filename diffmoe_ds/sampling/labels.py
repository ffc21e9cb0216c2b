"""The classes of generated images: they cycle, or are drawn uniformly at random.

The class of an image depends only on its index or its seed, so it is the same in any batch and on any rank.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe_ds.rng import label_stream


def cycle_labels(images: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Return int64 [N] labels: image k has class ``classes[k % len(classes)]``.

    Args:
        images: indices of the images.
        classes: the classes to choose from.
    """
    return torch.tensor([classes[image % len(classes)] for image in images], dtype=torch.int64)


def random_labels(seeds: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Return int64 [N] labels, drawn uniformly and independently, as in ADM's sample files.

    Args:
        seeds: seeds of the images; each label has its own stream, disjoint from the image's noise.
        classes: the classes to choose from.
    """
    drawn = [classes[int(label_stream(seed).integers(len(classes)))] for seed in seeds]
    return torch.tensor(drawn, dtype=torch.int64)
