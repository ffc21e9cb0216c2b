"""The prompts of text models: the options that choose them, and the encoders that turn them into features."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.control_files import parse_json_line, read_text
from diffmoe_ds.data.matching_encoders import matching_encoders
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.prompts import PromptSet
from diffmoe_ds.text import counted, reason, shortened
from diffmoe_ds.text_features import MAX_CAPTION_BYTES, TextFormat

PROMPT_OPTIONS = ("prompt", "prompts", "geneval", "negative_prompt", "text_encoder")
"""Options of text models."""


@dataclass(frozen=True)
class ChosenPrompts:
    """The prompts of a run."""

    texts: tuple[str, ...]
    """The prompt of each label."""
    negative: str = ""
    """The negative prompt."""
    encoders: tuple[str, ...] = ()
    """Where the text encoders are; empty: where the checkpoint says."""
    metadata: tuple[str, ...] = ()
    """GenEval's description of each prompt, one line of JSON; empty without ``--geneval``."""

    def settings(self, text: TextFormat) -> dict[str, Any]:
        """Return what determines images of the prompts, keyed by option name.

        Args:
            text: the encoders of the model.
        """
        digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]
        more = f" and {len(self.texts) - 1:,} more" if len(self.texts) > 1 else ""
        return {
            "prompt": f"{shortened(self.texts[0], 40)!r}{more} (SHA-256 {digest})",
            "negative_prompt": self.negative,
            "text_encoder": [encoder.sha256 for encoder in text.encoders],
        }


def choose_prompts(args: argparse.Namespace, reader: WeightsReader) -> ChosenPrompts | None:
    """Resolve the options that choose prompts.

    Args:
        args: of `cli.sample.add_sample_arguments`.
        reader: the model.

    Returns:
        The prompts; None for a class model.

    Raises:
        ConfigError: an option does not fit the model or another option, or a file of prompts cannot be read.
    """
    given = [f"--{name.replace('_', '-')}" for name in PROMPT_OPTIONS if getattr(args, name) is not None]
    if not reader.config.is_text:
        if given:
            raise ConfigError(f"{given[0]}: {reader.path} generates images from classes, not prompts; use --classes.")
        return None
    if args.classes is not None:
        raise ConfigError(f"--classes {args.classes}: {reader.path} generates images from prompts; use --prompt.")
    sources = [option for option in given if option in ("--prompt", "--prompts", "--geneval")]
    if not sources:
        raise ConfigError(f"{reader.path} generates images from prompts; pass --prompt TEXT or --prompts FILE.")
    if len(sources) > 1:
        raise ConfigError(f"{sources[0]} and {sources[1]} contradict each other; omit one.")
    _check_negative(args)
    metadata: list[str] = []
    if args.prompt is not None:
        texts = list(args.prompt)
    elif args.geneval is not None:
        lines = _lines(args.geneval, "--geneval")
        texts, metadata = _prompts_of_json(lines, f"--geneval {args.geneval}"), list(lines.values())
    else:
        texts = read_prompts(args.prompts)
    for text in texts:
        check_prompt(text, sources[0])
    check_prompt(args.negative_prompt or "", "--negative-prompt")
    return ChosenPrompts(
        tuple(texts), args.negative_prompt or "", tuple(map(str, args.text_encoder or ())), tuple(metadata)
    )


def _check_negative(args: argparse.Namespace) -> None:
    """Check that a negative prompt has an effect."""
    if args.negative_prompt is None:
        return
    if args.cfg_scale == 1:
        raise ConfigError("--negative-prompt needs guidance; set --cfg-scale to a value other than 1.")
    if args.autoguidance is not None:
        raise ConfigError("--negative-prompt has no effect with --autoguidance; omit one.")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: its lines that are not blank, or the ``prompt`` of each object of a JSONL file.

    Raises:
        ConfigError: the file cannot be read, or has no prompts.
    """
    lines = _lines(path, "--prompts")
    is_json = path.suffix.lower() == ".jsonl"
    return _prompts_of_json(lines, f"--prompts {path}") if is_json else list(lines.values())


def _lines(path: Path, option: str) -> dict[int, str]:
    """Return the lines of a UTF-8 file that are not blank, by their number."""
    try:
        every = enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1)
        lines = {number: line.strip() for number, line in every if line.strip()}
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConfigError(f"{option} {path}: must be UTF-8.") from None
    if not lines:
        raise ConfigError(f"{option} {path}: has no prompts; expected one on each line.")
    return lines


def _prompts_of_json(lines: Mapping[int, str], where: str) -> list[str]:
    """Return the prompt of each line, a JSON object."""
    found = []
    for number, line in lines.items():
        try:
            tree = parse_json_line(line)
        except ValueError as error:
            raise ConfigError(f"{where}: line {number} is not valid JSON: {reason(error)}.") from None
        prompt = tree.get("prompt") if isinstance(tree, dict) else None
        if not isinstance(prompt, str):
            raise ConfigError(f'{where}: line {number} must be like {{"prompt": "a red apple"}}, got {line[:80]!r}.')
        found.append(prompt)
    return found


def check_prompt(prompt: str, what: str) -> None:
    """Check that a prompt can be encoded and stored.

    Args:
        prompt: the prompt.
        what: the option or argument, for messages.

    Raises:
        ConfigError: it cannot.
    """
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: {shortened(prompt)!r} is not valid Unicode.") from None
    if size > MAX_CAPTION_BYTES:
        raise ConfigError(f"{what}: a prompt has {size:,} bytes; the limit is {MAX_CAPTION_BYTES:,}.")


def open_encoders(paths: Sequence[str], text: TextFormat, device: torch.device) -> TextEncoders:
    """Load the text encoders of a model.

    Args:
        paths: where they are; if empty, where they were when the model was trained.
        text: the encoders that the model was trained with.
        device: where they run.

    Raises:
        ConfigError: one cannot be loaded, or is not the one that the model was trained with.
    """
    names = [encoder.name for encoder in text.encoders]
    if paths and len(paths) != len(names):
        raise ConfigError(
            f"--text-encoder must be given {counted(len(names), 'time')}, for {' and '.join(names)}, got {len(paths)}."
        )
    try:
        return matching_encoders(text, device, paths, "--text-encoder")
    except ConfigError as error:
        if paths:
            raise
        raise ConfigError(f"{str(error).rstrip('.')}; pass its folder with --text-encoder.") from None


def prompt_set(chosen: ChosenPrompts, text: TextFormat, encoders: TextEncoders) -> tuple[PromptSet, str | None]:
    """Return prompts as the labels of a model.

    Args:
        chosen: the prompts.
        text: the encoders that the model was trained with.
        encoders: from `open_encoders`.

    Returns:
        The prompts, and a warning about those with more tokens than the encoders read.
    """
    prompts = PromptSet(chosen.texts, text, encoders.encode, chosen.negative)
    return prompts, encoders.truncation([*chosen.texts, chosen.negative])


def open_prompts(chosen: ChosenPrompts, text: TextFormat, device: torch.device) -> tuple[PromptSet, str | None]:
    """Load the text encoders of a model for some prompts; see `open_encoders` and `prompt_set`."""
    return prompt_set(chosen, text, open_encoders(chosen.encoders, text, device))
