"""Check the arguments of the Python interface, and name them in errors of code that serves the command line, too."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Real
from operator import index
from os import PathLike
from typing import Any, TypedDict

import numpy as np
import torch

from diffmoe_ds.cli.arguments import LARGEST, MAX_NUMBER
from diffmoe_ds.cli.sample_prompts import ChosenPrompts, check_prompt
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.load import flatten
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError, DiffMoEError
from diffmoe_ds.text import reason

Integers = Sequence[int] | np.ndarray | torch.Tensor
"""Integers in a list, range, array or tensor."""
Classes = Sequence[int | str] | np.ndarray | torch.Tensor
"""Labels or names of classes."""
OPTION = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)")
"""An option of the command line in an error message."""
RENAMED = {"config": "recipe", "set": "settings"}
"""Arguments whose option has another name."""


class SamplingOptions(TypedDict, total=False):
    """Further arguments of `Model.sample`."""

    sampler: str | None
    """flow: euler (default), heun, dopri5, sde; ddpm: ddpm (default), ddim, dpm."""
    routing: str | None
    """``per_token``, ``dynamic`` or ``static``, as the router supports; None is the model's default."""
    capacity: float | None
    """Average number of experts per token; None keeps that of training. The first call with other settings calibrates,
    which takes the time of a few hundred images."""
    batch_size: int
    """Images per batch, 50 by default."""


def check_options(options: SamplingOptions) -> None:
    """Check the names of further arguments, as Python does for others.

    Raises:
        TypeError: one is unknown.
    """
    for name in options.keys() - SamplingOptions.__annotations__.keys():
        raise TypeError(f"Model.sample() got an unexpected keyword argument {name!r}")


def checked_seeds(seeds: Integers) -> list[int]:
    """Return seeds as a list.

    Raises:
        ConfigError: they are not integers from 0 to 2^64 - 1 in a definite order, or there are none.
    """
    try:
        unordered = isinstance(seeds, (set, frozenset, Mapping))
        found = [] if unordered else [index(seed) for seed in islice(seeds, MAX_NUMBER + 1)]
    except TypeError:  # a number instead of a list, or fractions
        found = []
    if not found or not all(0 <= seed < 2**64 for seed in found):
        got = short_repr(seeds)
        raise ConfigError(f"seeds must be one or more integers from 0 to 2^64 - 1, such as range(8), got {got}.")
    if len(found) > MAX_NUMBER:
        raise ConfigError(f"seeds must be at most {MAX_NUMBER:,}, got more.")
    return found


def checked_classes(classes: Classes) -> list[str]:
    """Return labels and names of classes as words.

    Raises:
        ConfigError: they are not a list, or there are none.
    """
    values: Any = classes.tolist() if isinstance(classes, (np.ndarray, torch.Tensor)) else classes
    if isinstance(values, (str, set, frozenset, Mapping)) or not hasattr(values, "__len__") or len(values) == 0:
        raise ConfigError(f"classes must be a list of labels or names, got {short_repr(classes)}.")
    if len(values) > MAX_NUMBER:
        raise ConfigError(f"classes must be at most {MAX_NUMBER:,}, got {len(values):,}.")
    return [_word(value.item() if isinstance(value, torch.Tensor) else value) for value in values]


def _word(value: object) -> str:
    """Return a label or a name as text; Python refuses to print integers of thousands of digits."""
    return short_repr(value) if isinstance(value, int) and abs(value) >= 2**63 else str(value)


def checked_prompts(classes: Any, prompts: Any, negative: Any, cfg_scale: float) -> ChosenPrompts:
    """Return the prompts of a text model.

    Args:
        classes: must be None, because the model has no classes.
        prompts: one or more texts.
        negative: the negative prompt.
        cfg_scale: guidance scale.

    Raises:
        ConfigError: an argument is invalid or does not fit the model.
    """
    if classes is not None:
        raise ConfigError(f"classes {short_repr(classes)}: the model generates images from prompts; use prompts.")
    if prompts is None:
        raise ConfigError('the model generates images from prompts; pass prompts, such as ["a red apple"].')
    is_list = isinstance(prompts, (list, tuple, np.ndarray)) and 0 < len(prompts) <= MAX_NUMBER
    if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts must be a list of one or more texts, got {short_repr(prompts)}.")
    if not isinstance(negative, str):
        raise ConfigError(f"negative_prompt must be a text, got {short_repr(negative)}.")
    if negative and cfg_scale == 1:
        raise ConfigError("negative_prompt needs guidance; set cfg_scale to a value other than 1.")
    texts = tuple(str(prompt) for prompt in prompts)
    for text in texts:
        check_prompt(text, "prompts")
    check_prompt(negative, "negative_prompt")
    return ChosenPrompts(texts, negative)


def checked_encoders(text_encoder: Any, config: Config) -> tuple[str, ...]:
    """Return the argument ``text_encoder`` of `load` as a tuple; it is empty if the argument is None.

    Raises:
        ConfigError: it is not a path or several, or the model has none.
    """
    if text_encoder is None:
        return ()
    paths = text_encoder if isinstance(text_encoder, (list, tuple)) else [text_encoder]
    if not paths or not all(_is_path(path) for path in paths):
        raise ConfigError(f"text_encoder must be a path or a list of paths, got {short_repr(text_encoder)}.")
    if not config.is_text:
        raise ConfigError(f"text_encoder {short_repr(text_encoder)}: the model generates images from classes; omit it.")
    return tuple(str(path) for path in paths)


def check_numbers(steps: Any, batch_size: Any, cfg_scale: Any, capacity: Any) -> tuple[float, float | None, int]:
    """Check the numbers of `Model.sample` that can be checked without the model.

    Returns:
        The guidance scale, the capacity and the batch size as Python's own numbers.

    Raises:
        ConfigError: one has the wrong type or is out of range.
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {short_repr(batch_size)}.")
    if not _is_finite(cfg_scale) or cfg_scale < 0:
        raise ConfigError(f"cfg_scale must be a finite number of at least 0, got {short_repr(cfg_scale)}.")
    if capacity is not None and not _is_finite(capacity):
        raise ConfigError(f"capacity must be a finite number, got {short_repr(capacity)}.")
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if isinstance(value, int) and value > LARGEST[name]:
            raise ConfigError(f"{name} must be at most {LARGEST[name]:,}, got {short_repr(value)}.")
    return float(cfg_scale), None if capacity is None else float(capacity), int(batch_size)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer or a fraction beyond all floats
        return False


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return a device of this machine; if None, a GPU if there is one.

    Raises:
        ConfigError: torch does not know it or cannot use it here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"device {str(device)!r} cannot be used: {why}.") from None
    return place


def check_fit(recipe: Any, settings: Any, run_dir: Any, deepspeed_config: Any, resume: Any) -> None:
    """Check the types of arguments of `fit`.

    Raises:
        ConfigError: one has the wrong type.
    """
    if not isinstance(recipe, (str, PathLike)):
        raise ConfigError(f"recipe must be the name of a recipe or a YAML file, got {short_repr(recipe)}.")
    if run_dir is not None and not _is_path(run_dir):
        raise ConfigError(f"run_dir must be a path, got {short_repr(run_dir)}.")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f'settings must be a dict such as {{"run.seed": 1}}, got {short_repr(settings)}.')
    if deepspeed_config is not None and not isinstance(deepspeed_config, (str, PathLike)):
        raise ConfigError(
            "deepspeed_config must be a JSON file or the name of a shipped one; pass a dict as "
            f'settings={{"deepspeed": ...}}, got {short_repr(deepspeed_config)}.'
        )
    if not isinstance(resume, (str, PathLike)):
        raise ConfigError(f'resume must be "auto", "none" or a path, got {resume!r}.')


def _is_path(value: object) -> bool:
    """Return whether a value can name a file: text without null bytes or characters that file names cannot have."""
    try:
        return isinstance(value, (str, PathLike)) and b"\0" not in os.fsencode(value)
    except ValueError:
        return False


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, flat (``run.seed``) or nested in sections, in the form of ``--set``.

    Raises:
        ConfigError: a key is set in both forms, or a value has no JSON.
    """
    found: dict[str, str] = {}
    try:
        for name, content in settings.items():
            for key, value in flatten({name: content}).items():
                if key in found:
                    raise ConfigError(f"settings: {key} is set twice.")
                found[key] = json.dumps(value, default=str)
    except ConfigError:
        raise
    except (RecursionError, TypeError, ValueError) as error:  # contains itself, or has keys or numbers unlike JSON's
        why = "nested too deeply" if isinstance(error, RecursionError) else reason(error)
        raise ConfigError(f"settings cannot be written as JSON: {why}.") from None
    return [f"{key}={value}" for key, value in found.items()]


@contextmanager
def named_as_arguments(options: Sequence[str] = ()) -> Iterator[None]:
    """Within the context, errors about options name the arguments instead: ``cfg_scale``, not ``--cfg-scale``.

    Args:
        options: those that are arguments; all if empty.
    """

    def argument(match: re.Match[str]) -> str:
        if options and match[1] not in options:
            return match[0]
        return RENAMED.get(match[1], match[1].replace("-", "_"))

    try:
        yield
    except DiffMoEError as error:
        error.args = (OPTION.sub(argument, str(error)),)
        raise
