"""Which images ``diffmoe sample`` generates: their seeds, their classes or prompts, and their number."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.cli.arguments import MAX_NUMBER
from diffmoe_ds.cli.sample_prompts import ChosenPrompts, choose_prompts
from diffmoe_ds.cli.sampling_options import NUM_IMAGES
from diffmoe_ds.config.nearest import did_you_mean
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.labels import cycle_labels, random_labels
from diffmoe_ds.text import counted

LABEL = re.compile("-?[0-9]{1,18}")
"""A class given by its label."""
GENEVAL_IMAGES = 4
"""Images per prompt with ``--geneval``, as in GenEval's own script."""
SHOWN_NAMES = 12
"""Largest number of class names in a message."""


@dataclass(frozen=True)
class ImageSet:
    """The images of a run: image k has seed ``seed + k``, and a label that does not depend on its batch or rank."""

    num_images: int
    seed: int
    classes: tuple[int, ...]
    """The classes to choose from; for a text model, the numbers of the prompts."""
    labels: str
    """``cycle`` or ``random``."""
    out: Path
    """The output directory."""
    format: str
    """``npz``, ``png``, ``both`` or ``geneval``."""
    class_names: Sequence[str] = ()
    """Name of each label; empty if they are unknown."""
    prompts: ChosenPrompts | None = None
    """The prompts of a text model."""

    def seeds_of(self, images: range) -> range:
        """Return the seeds of images."""
        return range(self.seed + images.start, self.seed + images.stop)

    def labels_of(self, images: range) -> Tensor:
        """Return the int64 labels of images."""
        if self.labels == "cycle":
            return cycle_labels(images, self.classes)
        return random_labels(self.seeds_of(images), self.classes)


def choose_images(args: argparse.Namespace, reader: WeightsReader) -> ImageSet:
    """Resolve the options that select the images to generate.

    Args:
        args: of `cli.sample.add_sample_arguments`.
        reader: the model.

    Raises:
        ConfigError: an option does not fit the model or another option.
    """
    prompts = choose_prompts(args, reader)
    num_classes = reader.config.model.num_classes
    names: tuple[str, ...] = ()
    if prompts is not None:
        classes = tuple(range(len(prompts.texts)))
    else:
        names = (reader.class_names or ())[:num_classes]
        classes = tuple(range(num_classes))
        if args.classes is not None:
            if num_classes == 1:
                raise ConfigError(
                    f"--classes {args.classes}: {reader.path} was trained without classes; omit the option."
                )
            classes = parse_classes(args.classes, num_classes, names)
    num_images = _choose_number(args, len(classes), is_text=prompts is not None)
    last_seed = 2**64 - 2 * num_images  # ranks that share experts may generate extra images, which are discarded
    if not 0 <= args.seed <= last_seed:
        images = counted(num_images, "image")
        raise ConfigError(f"--seed must be from 0 to {last_seed} with {images}, got {args.seed}.")
    return ImageSet(num_images, args.seed, classes, args.labels, args.out, format_of(args), names, prompts)


def _choose_number(args: argparse.Namespace, num_classes: int, is_text: bool) -> int:
    """Return the number of images.

    Args:
        args: of `cli.sample.add_sample_arguments`.
        num_classes: number of classes or prompts to choose from.
        is_text: whether they are prompts; there is one image of each by default.

    Raises:
        ConfigError: options contradict each other, or the number is too large.
    """
    option, what = ("--per-prompt", "prompts") if is_text else ("--per-class", "classes")
    each = args.per_class
    if each is not None and args.num_images is not None:
        raise ConfigError(f"{option} {each} and --num-images {args.num_images} contradict each other; omit one.")
    if each is not None and args.labels == "random":
        raise ConfigError(f"{option} {each} and --labels random contradict each other; omit one.")
    if args.geneval is not None:
        for name, value, default in (("num-images", args.num_images, None), ("labels", args.labels, "cycle")):
            if value != default:
                raise ConfigError(f"--geneval and --{name} {value} contradict each other; use --per-prompt.")
        each = each or GENEVAL_IMAGES
    if args.num_images is not None:
        return int(args.num_images)
    num_images = NUM_IMAGES if each is None and not is_text else (each or 1) * num_classes
    if num_images > MAX_NUMBER:
        raise ConfigError(
            f"{option} {each or 1} gives {num_images:,} images of {num_classes:,} {what}; at most {MAX_NUMBER:,} are "
            "possible."
        )
    return num_images


def format_of(args: argparse.Namespace) -> str:
    """Return the format of the results, one of `sample_set.FORMATS`.

    Raises:
        ConfigError: both ``--geneval`` and ``--format`` are given.
    """
    if args.geneval is not None and args.format is not None:
        raise ConfigError(f"--geneval and --format {args.format} contradict each other; omit one.")
    return "geneval" if args.geneval is not None else args.format or "npz"


def parse_classes(text: str, num_classes: int, names: Sequence[str]) -> tuple[int, ...]:
    """Return the classes of ``--classes``.

    Args:
        text: labels or names, separated by commas; a number is always a label, even if it is also a name.
        num_classes: classes of the model.
        names: name of each label; empty if they are unknown.

    Raises:
        ConfigError: a class is unknown, out of range or repeated.
    """
    words = [part.strip() for part in text.split(",")]
    if not all(words):
        raise ConfigError(f"--classes {text!r}: a class is empty; separate labels or names by one comma, as in 1,2.")
    found: list[int] = []
    for word in words:
        label = find_class(word, num_classes, names, "--classes")
        if label in found:
            raise ConfigError(f"--classes {text}: class {label} is repeated.")
        found.append(label)
    return tuple(found)


def find_class(word: str, num_classes: int, names: Sequence[str], what: str) -> int:
    """Return the label of a class.

    Args:
        word: a label or a name; a number is always a label.
        num_classes: classes of the model.
        names: name of each label; empty if they are unknown.
        what: the option or argument, for messages.

    Raises:
        ConfigError: the class is unknown or out of range.
    """
    labels = {name.casefold(): label for label, name in enumerate(names)}
    if LABEL.fullmatch(word):
        if not 0 <= int(word) < num_classes:
            raise ConfigError(f"{what} must be from 0 to {num_classes - 1} for this model, got {word}.")
        return int(word)
    if word.casefold() in labels:
        return labels[word.casefold()]
    hint = did_you_mean(word, names) or ("" if names else "the checkpoint does not record class names; ")
    raise ConfigError(f"{what}: {word!r} is not known; {hint}valid: {_valid(num_classes, names)}.")


def _valid(num_classes: int, names: Sequence[str]) -> str:
    """Return the labels and the first names of the classes, for messages."""
    more = ["..."] if len(names) > SHOWN_NAMES else []
    listed = ", ".join([*names[:SHOWN_NAMES], *more])
    return f"0 to {num_classes - 1}" + (f", or {listed}" if names else "")
