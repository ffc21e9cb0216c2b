"""Images that the Python interface returns.

Legend: N images, H, W height and width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from diffmoe_ds.sampling.grid import Pixels, class_grid, prompt_grid
from diffmoe_ds.text import counted


@dataclass(frozen=True)
class Samples:
    """Generated images. Notebooks show them as a grid, with one column per class or prompt if these repeat.

    >>> samples = diffmoe_ds.load("runs/demo").sample(classes=["bag"], seeds=range(2), steps=2)
    >>> samples.images.shape, samples.labels.tolist()
    ((2, 32, 32, 1), [8, 8])
    >>> samples.to_pil()[0].size
    (32, 32)
    """

    images: Pixels
    """uint8 [N, H, W, C], C 1 or 3."""
    labels: np.ndarray
    """int64 [N]: the class of each image, or the number of its prompt."""
    class_names: tuple[str, ...] | None = None
    """The name of each class, if the training set had names."""
    prompts: tuple[str, ...] | None = None
    """The prompts, if the model is a text model."""

    def __repr__(self) -> str:
        """Return one line: interactive sessions would print all pixels."""
        count, height, width, channels = self.images.shape
        return f"Samples({counted(count, 'image')}, {height}x{width}x{channels})"

    def to_pil(self) -> list[Image.Image]:
        """Return the images as Pillow images, gray or RGB.

        >>> samples.to_pil()[0].save("first.png")
        """
        return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in self.images]

    def _repr_png_(self) -> bytes:
        file, labels = BytesIO(), self.labels.tolist()
        classes = list(dict.fromkeys(labels))
        cycle = all(label == classes[image % len(classes)] for image, label in enumerate(labels))
        if self.prompts is None:
            grid = class_grid(self.images, classes if cycle else (), self.class_names or ())
        else:
            grid = prompt_grid(self.images, [self.prompts[label] for label in labels])
        Image.fromarray(grid).save(file, "PNG")
        return file.getvalue()
