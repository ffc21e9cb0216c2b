"""The prompts of a text model's sample grids.

Legend: P prompts, N values of a row of text features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.matching_encoders import matching_encoders
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.distributed.collectives import broadcast, get_rank
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.evaluation.stored_prompts import RowPrompts, evenly_spaced
from diffmoe_ds.text_features import TextFormat, padded_row

SHOWN_CAPTIONS = 8
"""Most captions of training images in a grid; `sample.prompts` may be more."""


@dataclass(frozen=True)
class GridPrompts:
    """Prompts and their features."""

    features: RowPrompts
    """On all ranks."""
    texts: tuple[str, ...]
    """On rank 0 only."""


def grid_prompts(config: Config, dataset: Dataset, device: torch.device) -> GridPrompts:
    """Return the prompts of a run's sample grids. Every rank must call this.

    They are those of `sample.prompts`, which the encoders of the training set encode, or else captions of the training
    set. Rank 0 reads or encodes them, because encoders may be large.

    Args:
        config: of a text model.
        dataset: the training images.
        device: of the tensors of the collectives.

    Raises:
        ConfigError: on all ranks, if rank 0 cannot load the encoders, or they are not those of the training set.
        DataError: on all ranks, if rank 0 cannot read a caption.
    """
    text = dataset.text
    assert text is not None, "checked by `with_text`"
    given = config.sample.prompts[: config.sample.num_images]
    stored = evenly_spaced(dataset, min(SHOWN_CAPTIONS, config.sample.num_images))
    count = len(given or stored)

    def read() -> tuple[np.ndarray, tuple[str, ...]]:
        if get_rank():
            return np.zeros((count, text.layout.values), np.float16), ()
        if given:
            return _encoded(given, text), given
        return stored.rows(list(range(count))).numpy(), tuple(stored.captions())

    rows_PN, texts = raise_on_all_ranks(device, read)
    shared = torch.from_numpy(rows_PN).view(torch.int32).to(device)  # not every backend has fp16
    rows = broadcast(shared).cpu().view(torch.float16)
    return GridPrompts(RowPrompts(rows, torch.from_numpy(text.null_row)), texts)


def _encoded(prompts: tuple[str, ...], text: TextFormat) -> np.ndarray:
    """Return the features of prompts, fp16 [P, N], by the encoders of a dataset, and warn about those too long."""
    try:
        encoders = matching_encoders(text, torch.device("cpu"))
    except ConfigError as error:
        raise ConfigError(
            f"sample.prompts needs the text encoders of the training set: {str(error).rstrip('.')}; remove it to show "
            "captions instead."
        ) from None
    if warning := encoders.truncation(prompts):
        print(f"*** WARNING: sample.prompts: {warning} ***", file=sys.stderr, flush=True)
    captions = (encoders.encode([prompt])[0] for prompt in prompts)  # each alone: its features depend on no other
    return np.stack([padded_row(text.layout, caption.features) for caption in captions])
