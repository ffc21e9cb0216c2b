"""Read one micro-batch, in the training process or in a worker that writes it to shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from diffmoe_ds.data.shuffle import Shuffle
from diffmoe_ds.data.sources.image_features import FeatureFormat
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.shards import Sample
from diffmoe_ds.data.sources.tar_index import NO_LABEL
from diffmoe_ds.errors import DataError
from diffmoe_ds.rng import TrainingDraws
from diffmoe_ds.text import counted
from diffmoe_ds.text_features import TextFormat

MAX_REPLACED = 100
"""Unreadable images in a row that are replaced by the same image; more mean that none can be read."""


HALF = ("features", "text")
"""Large fields of a micro-batch in fp16."""


class Dataset(Protocol):
    """What the loader needs of a dataset; `ShardDataset`, `RawImages` and `EncodedCaptions` implement it."""

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 [n]; all `NO_LABEL` in a dataset without labels."""

    @property
    def classes(self) -> list[str] | None:
        """Name of each label, if labels have names."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples of each shard, in order, for shuffling in windows."""

    @property
    def latents(self) -> LatentFormat | None:
        """How latents are stored, if samples are read by `read_moments`; None if they are read one by one."""

    @property
    def text(self) -> TextFormat | None:
        """How text features are stored, if samples have any, which `text_rows` reads."""

    @property
    def features(self) -> FeatureFormat | None:
        """How image features are stored, if samples have any, which `read_features` reads."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def read_moments(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray: ...
    def read_features(self, indices: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray: ...
    def captions(self, index: int) -> list[str]: ...
    def text_rows(self, indices: Sequence[int], choices: Sequence[float]) -> np.ndarray: ...
    def describe(self, index: int) -> str: ...
    def prefetch(self, shards: Iterable[int]) -> None: ...


class Task(NamedTuple):
    """The positions of a micro-batch, and its number in this iterator."""

    number: int
    positions: range


class Unreadable(NamedTuple):
    """An image that cannot be read."""

    image: int  # its index in the dataset
    problem: str  # a sentence


class Packed(NamedTuple):
    """A micro-batch as the reader returns it."""

    large: torch.Tensor | None  # float32, flat, see `Reader.split`; None: in a slot
    label: np.ndarray
    time: np.ndarray
    drop: np.ndarray
    position: np.ndarray
    unreadable: tuple[Unreadable, ...] = ()  # images that were replaced


@dataclass(frozen=True)
class Reader:
    """Reads the micro-batch of a task.

    Passing a tensor from a worker through newly shared memory costs the training process over a millisecond, more than
    reading it does.  The large fields are therefore concatenated in a slot of memory that is shared before the workers
    start; the small ones are sent with the message.
    """

    dataset: Dataset
    shuffle: Shuffle
    draws: Callable[[int], TrainingDraws]
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the large fields of a `MicroBatch`: x, noise, posterior if x is not encoded yet, features if image
    features are read, text if text is read. Those of `HALF` are stored as float32, with half as many columns."""
    slots: torch.Tensor | None
    """float32 [workers, slots per worker, values per micro-batch]; None without workers."""
    replaces: bool = False
    """Whether the image of the next position replaces one that cannot be read."""
    choose: Callable[[int], float] | None = None
    """Returns which caption a position uses, see `ShardDataset.text_rows`; None reads no text, for class models."""

    def __getitem__(self, task: Task) -> Packed | DataError:
        try:
            return self._micro_batch(task)
        except DataError as error:
            return error  # if raised in a worker, its message would contain a traceback

    def slot(self, number: int) -> torch.Tensor:
        """Return the slot of a micro-batch; torch assigns tasks to workers round-robin."""
        assert self.slots is not None
        workers, each, _ = self.slots.shape
        return self.slots[number % workers, number // workers % each]

    @property
    def values(self) -> int:
        """Return the float32 values of a micro-batch."""
        return sum(map(math.prod, self.shapes.values()))

    def split(self, large: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields of a flat tensor, by their names in `MicroBatch`."""
        parts = large.split([math.prod(shape) for shape in self.shapes.values()])
        fields = {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
        return {name: field.view(torch.float16) if name in HALF else field for name, field in fields.items()}

    def _micro_batch(self, task: Task) -> Packed:
        draws = [self.draws(position) for position in task.positions]
        indices = [self.shuffle(position) for position in task.positions]
        self.dataset.prefetch(self.shuffle.next_shards(task.positions[-1]))
        large = torch.empty(self.values) if self.slots is None else self.slot(task.number)
        fields = {name: field.numpy() for name, field in self.split(large).items()}
        np.stack([each.noise for each in draws], out=fields["noise"])
        if "posterior" in fields:
            np.stack(_posteriors(draws), out=fields["posterior"])
        problems: list[Unreadable] = []
        if self.dataset.latents is None:
            indices, problems = self._pixels(task.positions, draws, fields["x"])
        else:
            self._latents(indices, draws, self.dataset.latents, fields["x"])
        if "features" in fields:
            fields["features"][:] = self.dataset.read_features(indices, [each.flip for each in draws])
        if self.choose is not None:
            fields["text"][:] = self.dataset.text_rows(indices, [self.choose(position) for position in task.positions])
        labels = self.dataset.labels[indices]
        return Packed(
            large=large if self.slots is None else None,
            label=np.where((labels == NO_LABEL) | (self.choose is not None), 0, labels),
            time=np.array([each.time for each in draws], np.float32),
            drop=np.array([each.drop for each in draws], bool),
            position=np.array(task.positions, np.int64),
            unreadable=tuple(problems),
        )

    def _latents(self, indices: list[int], draws: list[TrainingDraws], latents: LatentFormat, out: np.ndarray) -> None:
        assert draws[0].posterior is not None, "draws for prepared latents need posterior=True"
        noise = np.stack(_posteriors(draws))
        moments = latents.decode(self.dataset.read_moments(indices, [each.flip for each in draws]))
        latents.sample(moments, noise, out)
        if not np.isfinite(out).all():
            bad = int(np.argmin(np.isfinite(out).all(axis=(1, 2, 3))))
            raise DataError(f"{self.dataset.describe(indices[bad])} has a latent that contains NaN or Inf")

    def _pixels(
        self, positions: range, draws: list[TrainingDraws], out: np.ndarray
    ) -> tuple[list[int], list[Unreadable]]:
        """Read images, and return their indices and those that they replace."""
        shape, indices, problems = self.shapes["x"][1:], [], []
        for row, (position, each) in enumerate(zip(positions, draws, strict=True)):
            index, image, found = self._readable(position)
            out[row] = _model_range(image[:, :, ::-1] if each.flip else image, shape)
            indices.append(index)
            problems += found
        return indices, problems

    def _readable(self, position: int) -> tuple[int, np.ndarray, list[Unreadable]]:
        """Return the image of a position, or of the next one with a readable image, and those before it."""
        problems: list[Unreadable] = []
        while True:
            index = self.shuffle(position + len(problems))
            try:
                image = self.dataset[index].image
                self._check(image, index)
                return index, image, problems
            except DataError as error:
                if not self.replaces or len(problems) == MAX_REPLACED:
                    raise
                problems.append(Unreadable(index, str(error)))

    def _check(self, image: np.ndarray, index: int) -> None:
        expected = self.shapes["x"][1:]
        if image.dtype == np.uint8:
            fits = image.shape[0] == expected[0] and image.shape[1] <= expected[1] and image.shape[2] <= expected[2]
        else:
            fits = image.shape == expected
        if not fits:
            rule = "at most" if image.dtype == np.uint8 else "exactly"
            raise DataError(
                f"{self.dataset.describe(index)} has shape {image.shape}; "
                f"the model takes {counted(expected[0], 'channel')} of {rule} {expected[1]}x{expected[2]}"
            )


def _posteriors(draws: list[TrainingDraws]) -> list[np.ndarray]:
    return [each.posterior for each in draws if each.posterior is not None]


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Check that the labels fit the model's number of classes.

    Raises:
        DataError: there are no labels for a model of several classes, or a label is too large.
    """
    labels = dataset.labels
    if labels[0] == NO_LABEL:  # then all are, see ShardDataset
        if num_classes > 1:
            raise DataError(
                f"{dataset.describe(0)} and all others have no label, but the model has {num_classes} classes; "
                "use labelled images, or a model without classes (model.num_classes=auto)"
            )
    elif labels.max() >= num_classes:
        index = int(np.argmax(labels >= num_classes))
        raise DataError(
            f"{dataset.describe(index)} has the label {labels[index]}; "
            f"the model has {num_classes} classes, 0 to {num_classes - 1}"
        )


def text_shape(dataset: Dataset) -> tuple[int]:
    """Return the shape (N / 2,) of the text features of one sample, as float32."""
    assert dataset.text is not None, "checked by `with_text`"
    return (dataset.text.layout.values // 2,)


def features_shape(dataset: Dataset) -> tuple[int, int]:
    """Return the shape (T, F / 2) of the image features of one sample, as float32."""
    assert dataset.features is not None, "checked by `with_features`"
    tokens, width = dataset.features.shape
    return tokens, width // 2


def check_latents(latents: LatentFormat | None, shape: tuple[int, int, int]) -> None:
    """Check that prepared latents have the shape of the model's input.

    Raises:
        DataError: they do not.
    """
    if latents is not None and latents.shape != shape:
        raise DataError(
            f"the shards hold latents of shape {latents.shape}; the model takes {shape}: set model.in_channels to "
            f"{latents.channels} and model.input_size to {latents.size}"
        )


def _model_range(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 of `shape`: a uint8 image padded centrally with 0 and scaled to [-1, 1], or a latent unchanged."""
    if image.dtype != np.uint8:
        return image
    _, height, width = image.shape
    top, left = (shape[1] - height) // 2, (shape[2] - width) // 2
    padded = np.zeros(shape, np.uint8)
    padded[:, top : top + height, left : left + width] = image
    return padded.astype(np.float32) / 127.5 - 1
