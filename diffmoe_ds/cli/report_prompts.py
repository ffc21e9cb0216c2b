"""The prompts of a report on a text model: those of its options, or captions of the run's dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.cli.sample_prompts import ChosenPrompts, choose_prompts, open_encoders, prompt_set
from diffmoe_ds.cli.sampling_options import REPORT_CLASSES
from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.captions import open_captions
from diffmoe_ds.data.dataset import check_exists, open_dataset, open_source
from diffmoe_ds.errors import ConfigError, DataError, DiffMoEError
from diffmoe_ds.evaluation.stored_prompts import DatasetPrompts, evenly_spaced, spaced
from diffmoe_ds.model.conditioning import Prompts
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.prompts import set_prompts
from diffmoe_ds.text_features import difference


@dataclass(frozen=True)
class ReportPrompts:
    """The prompts, and how to compute their features."""

    chosen: ChosenPrompts
    """The prompts."""
    stored: DatasetPrompts | None = None
    """Their features in the run's dataset; None if they are to be encoded."""

    def attach(self, models: Sequence[DiT], reader: WeightsReader, device: torch.device) -> None:
        """Set the prompts of models, with their features; encoders are loaded if they are needed.

        Args:
            models: the text model, and possibly the one that guides it.
            reader: the weights of the former.
            device: where encoders run.

        Raises:
            ConfigError: an encoder cannot be loaded, or is not the one that the model was trained with.
        """
        assert reader.text is not None, "a text model"
        prompts: Prompts | None = self.stored
        if prompts is None:
            encoders = open_encoders(self.chosen.encoders, reader.text, device)
            prompts, warning = prompt_set(self.chosen, reader.text, encoders)
            if warning is not None:
                print(f"{'warning':>11}  {warning}", flush=True)
        for model in models:
            set_prompts(model, prompts)


def choose_report_prompts(args: argparse.Namespace, reader: WeightsReader, trained: Config) -> ReportPrompts | None:
    """Return the prompts of a report; None for a class model.

    Args:
        args: of `cli.report.add_report_arguments`.
        reader: the model.
        trained: the run's configuration, which names the dataset.

    Raises:
        ConfigError: an option does not fit the model.
        DataError: no prompt was given, and the captions of the run's dataset cannot be used.
    """
    is_given = args.prompt is not None or args.prompts is not None
    if not reader.config.is_text or is_given or args.classes is not None:
        chosen = choose_prompts(args, reader)
        return None if chosen is None else ReportPrompts(chosen)
    if args.negative_prompt is not None:
        raise ConfigError("--negative-prompt needs --prompt or --prompts.")
    count = args.num_classes or min(REPORT_CLASSES, args.images)
    try:
        return _captions(args, reader, trained, count)
    except DiffMoEError as error:
        raise DataError(
            f"captions of the run's dataset cannot be used: {str(error).rstrip('.')}; pass --prompt to generate images"
        ) from None


def _captions(args: argparse.Namespace, reader: WeightsReader, trained: Config, count: int) -> ReportPrompts:
    """Return captions of evenly spaced images of the run's dataset.

    Raises:
        DiffMoEError: they cannot be read, or were encoded with other encoders.
    """
    check_exists(trained)
    data, paths = trained.data, tuple(args.text_encoder or ())
    if data.text_encoder:  # the features were never stored; those of all captions would take long
        source = open_source(data.path or "")
        captions = open_captions(source, data.captions)
        texts = [captions.captions(index)[0] for index in spaced(len(source), count)]
        return ReportPrompts(ChosenPrompts(tuple(texts), encoders=paths))
    dataset = open_dataset(trained)
    if dataset.text is None or reader.text is None:
        raise DataError(f"{data.path or 'the embedded set'} has no text features")
    differs = difference(dataset.text, reader.text)
    if differs is not None:
        raise DataError(f"the model was trained with text encoders other than those of {data.path}: {differs}")
    stored = evenly_spaced(dataset, count)
    return ReportPrompts(ChosenPrompts(tuple(stored.captions())), stored)
