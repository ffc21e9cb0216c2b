"""Check the arguments of the Python interface, and name them in errors of code that serves the command line, too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from operator import index
from os import PathLike
from typing import Any

import numpy as np
import torch

from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.load import flatten
from diffmoe_ds.errors import ConfigError, DiffMoEError

Integers = Sequence[int] | np.ndarray | torch.Tensor
"""Integers in a list, range, array or tensor."""
Classes = Sequence[int | str] | np.ndarray | torch.Tensor
"""Labels or names of classes."""
OPTION = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)")
"""An option of the command line in an error message."""
RENAMED = {"config": "recipe", "set": "settings"}
"""Arguments whose option has another name."""


def checked_seeds(seeds: Integers) -> list[int]:
    """Return seeds as a list.

    Raises:
        ConfigError: they are not integers from 0 to 2^64 - 1 in a definite order, or there are none.
    """
    try:
        found = [] if isinstance(seeds, (set, frozenset, Mapping)) else [index(seed) for seed in seeds]
    except TypeError:  # a number instead of a list, or fractions
        found = []
    if not found or not all(0 <= seed < 2**64 for seed in found):
        got = short_repr(seeds)
        raise ConfigError(f"seeds must be one or more integers from 0 to 2^64 - 1, such as range(8), got {got}.")
    return found


def checked_classes(classes: Classes) -> list[str]:
    """Return labels and names of classes as words.

    Raises:
        ConfigError: they are not a list, or there are none.
    """
    values: Any = classes.tolist() if isinstance(classes, (np.ndarray, torch.Tensor)) else classes
    if isinstance(values, (str, set, frozenset, Mapping)) or not hasattr(values, "__len__") or len(values) == 0:
        raise ConfigError(f"classes must be a list of labels or names, got {classes!r}.")
    return [str(value.item() if isinstance(value, torch.Tensor) else value) for value in values]


def check_numbers(batch_size: Any, cfg_scale: Any, capacity: Any) -> None:
    """Check the numbers of `Model.sample` that can be checked without the model.

    Raises:
        ConfigError: one has the wrong type or is out of range.
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if not _is_finite(cfg_scale) or cfg_scale < 0:
        raise ConfigError(f"cfg_scale must be a finite number of at least 0, got {cfg_scale!r}.")
    if capacity is not None and not _is_finite(capacity):
        raise ConfigError(f"capacity must be a finite number, got {capacity!r}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"device {str(device)!r} cannot be used: {reason}.") from None
    return place


def check_fit(settings: Any, deepspeed_config: Any, resume: Any) -> None:
    """Check the types of arguments of `fit`.

    Raises:
        ConfigError: one has the wrong type.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f'settings must be a dict such as {{"run.seed": 1}}, got {short_repr(settings)}.')
    if deepspeed_config is not None and not isinstance(deepspeed_config, (str, PathLike)):
        raise ConfigError(
            "deepspeed_config must be a JSON file or the name of a shipped one; pass a dict as "
            f'settings={{"deepspeed": ...}}, got {short_repr(deepspeed_config)}.'
        )
    if not isinstance(resume, (str, PathLike)):
        raise ConfigError(f'resume must be "auto", "none" or a path, got {resume!r}.')


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, flat (``run.seed``) or nested in sections, in the form of ``--set``.

    Raises:
        ConfigError: a key is set in both forms.
    """
    found: dict[str, str] = {}
    for name, content in settings.items():
        for key, value in flatten({name: content}).items():
            if key in found:
                raise ConfigError(f"settings: {key} is set twice.")
            found[key] = json.dumps(value, default=str)
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
